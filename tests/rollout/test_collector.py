"""Dynamic sampling over scripted accuracies: what is used, what is kept, what is counted."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.batching.trajectory import Trajectory
from megatron_fipo.config import RolloutConfig
from megatron_fipo.data.dataset import Dataset
from megatron_fipo.data.problem import Problem
from megatron_fipo.errors import UserError
from megatron_fipo.reward.score import Score
from megatron_fipo.rollout.collector import (
    Collected,
    GroupScorer,
    collect_iteration,
    groups_from_json,
    groups_to_json,
    request_seed,
)
from megatron_fipo.rollout.pool import RoundResult
from megatron_fipo.rollout.protocol import Generation, GenerationRequest, SamplingParams

RIGHT, WRONG = 5, 6
OUTCOMES = {"mixed": [RIGHT, WRONG], "right": [RIGHT, RIGHT], "wrong": [WRONG, WRONG], "failed": None}


class ScriptedPool:
    """Answers the k-th request it ever sees with the k-th outcome."""

    def __init__(self, outcomes: Sequence[str]) -> None:
        self.outcomes = list(outcomes)
        self.requests: list[GenerationRequest] = []

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: SamplingParams,
        version: int,
        on_finished: Callable[[int], None] | None = None,
    ) -> RoundResult:
        answers: list[list[Generation] | None] = []
        for request in requests:
            last_tokens = OUTCOMES[self.outcomes[len(self.requests)]]
            self.requests.append(request)
            if last_tokens is None:
                answers.append(None)
            else:
                answers.append([Generation((9, token), (-0.1, -0.2), "stop", version) for token in last_tokens])
            if on_finished is not None:
                on_finished(len(answers))
        return RoundResult(answers, retries=answers.count(None))


def score(response_text: str, problem: Problem, finish_reason: str) -> Score:
    right = response_text.endswith(str(RIGHT))
    return Score(1.0 if right else -1.0, float(right), answer=response_text)


SCORE_GROUP = GroupScorer(score, lambda ids: " ".join(map(str, ids)), 64, 0, 1.0)


def dataset(size: int = 50) -> Dataset:
    return Dataset([Problem(f"p{index}", (index,), f"prompt {index}", "x", "test") for index in range(size)], seed=3)


def collect(pool: ScriptedPool, target: int, per_round: int = 4, rounds: int = 3, **options) -> Collected:
    config = RolloutConfig(prompts_per_round=per_round, max_generation_rounds=rounds, max_staleness=options.pop("staleness", 1))
    arguments = {"dataset": dataset(), "surplus": [], "version": 5, "seed": 1, **options}
    return collect_iteration(
        pool=pool, score_group=SCORE_GROUP, config=config, target_groups=target, responses_per_prompt=2, **arguments
    )


def group(version: int, name: str) -> list[Trajectory]:
    return [Trajectory(name, [1], [2], [1], [-0.5], version, "stop", accuracy=accuracy) for accuracy in (0.0, 1.0)]


@given(
    outcomes=st.lists(st.sampled_from(sorted(OUTCOMES)), min_size=12, max_size=12),
    target=st.integers(1, 12),
    surplus_versions=st.lists(st.integers(3, 4), max_size=4),
)
def test_everything_generated_is_accounted_for(outcomes, target, surplus_versions):
    pool = ScriptedPool(outcomes)
    surplus = [group(version, f"old{index}") for index, version in enumerate(sorted(surplus_versions))]
    usable = [item for item in surplus if item[0].weight_version == 4]
    if not usable and "mixed" not in outcomes:
        with pytest.raises(UserError):
            collect(pool, target, surplus=surplus)
        return
    result = collect(pool, target, surplus=surplus)
    counts = result.counts
    seen = outcomes[: len(pool.requests)]
    assert counts.prompts == len(pool.requests) == 4 * counts.rounds
    assert counts.informative == seen.count("mixed")
    assert counts.all_right == seen.count("right")
    assert counts.all_wrong == seen.count("wrong")
    assert counts.failed == counts.retries == seen.count("failed")
    assert counts.generated_tokens == 4 * (len(seen) - counts.failed)
    assert counts.stale == len(surplus) - len(usable)
    kept = result.groups + result.surplus
    assert len(result.groups) == min(target, len(kept))
    assert kept[: len(usable)] == usable
    assert counts.from_surplus == min(len(usable), target)
    wanted = [request.request_id for request, outcome in zip(pool.requests, seen, strict=True) if outcome == "mixed"]
    assert [item[0].group_id for item in kept[len(usable) :]] == wanted
    assert len(result.groups) == target or counts.rounds == 3


def test_enough_surplus_needs_no_round():
    pool = ScriptedPool([])
    result = collect(pool, 2, surplus=[group(4, "a"), group(4, "b"), group(5, "c")])
    assert [item[0].group_id for item in result.groups] == ["a", "b"]
    assert [item[0].group_id for item in result.surplus] == ["c"]
    assert result.counts.rounds == 0


def test_staleness_zero_discards():
    result = collect(ScriptedPool(["mixed"] * 4), 2, surplus=[group(4, "a")], staleness=0)
    assert result.counts.stale == 1
    assert all(item[0].weight_version == 5 for item in result.groups)


def test_nothing_to_learn_from_is_said_with_the_mend():
    with pytest.raises(
        UserError, match=r"none of 12 prompts in 3 .*\(6 all right, 6 all wrong, 0 failed\).*responses_per_prompt"
    ):
        collect(ScriptedPool(["right", "wrong"] * 6), 2)
    with pytest.raises(UserError, match="all 12 rollout requests failed"):
        collect(ScriptedPool(["failed"] * 12), 2)


def test_seeds_differ_between_requests_and_repeat_between_runs():
    def seeds(**options) -> list[int]:
        pool = ScriptedPool(["mixed"] * 12)
        collect(pool, 12, **options)
        return [request.seed for request in pool.requests]

    first = seeds()
    assert first == seeds()
    assert len({*first, *seeds(seed=2), *seeds(version=6)}) == 36
    repeated = seeds(dataset=dataset(size=3))
    assert len(set(repeated)) == 12
    assert all(0 <= seed < 2**63 for seed in repeated)
    assert request_seed(1, "5-0-p0") == request_seed(1, "5-0-p0")


def test_a_trajectory_carries_what_sampling_and_scoring_learnt():
    scorer = GroupScorer(score, lambda ids: "".join(map(str, ids)), max_response_length=8, overlong_buffer=4, overlong_factor=1.0)
    problem = Problem("p", (3, 4), "prompt", "x", "test")
    generations = [
        Generation((9, 9, RIGHT), (-0.1, -0.2, -0.3), "stop", 7),
        Generation((9, 9, 9, 9, 9, RIGHT), (-0.1,) * 6, "stop", 7),
        Generation((9,) * 8, (-0.1,) * 8, "length", 7),
    ]
    short, long, cut = scorer(problem, "g", generations)
    assert (short.reward, long.reward, cut.reward) == (1.0, 0.5, -2.0)
    assert (short.accuracy, long.accuracy, cut.accuracy) == (1.0, 1.0, 0.0)
    assert asdict(short) == {
        "group_id": "g",
        "prompt_ids": [3, 4],
        "response_ids": [9, 9, RIGHT],
        "response_mask": [1, 1, 1],
        "rollout_log_probs": [-0.1, -0.2, -0.3],
        "weight_version": 7,
        "finish_reason": "stop",
        "reward": 1.0,
        "accuracy": 1.0,
        "advantage": 0.0,
        "extra": {"problem_id": "p", "answer": f"99{RIGHT}"},
    }
    assert cut.finish_reason == "length"


def test_surplus_survives_json_to_the_bit():
    result = collect(ScriptedPool(["mixed"] * 4), 1)
    result.surplus[0][0].rollout_log_probs = [-0.1 - 0.2, -1e-17]
    state = json.loads(json.dumps(groups_to_json(result.surplus)))
    assert groups_from_json(state) == result.surplus


def test_progress_counts_rounds_and_groups():
    heard = []
    collect(ScriptedPool(["wrong"] * 7 + ["mixed"]), 1, progress=lambda rounds, finished: heard.append((rounds, finished)))
    assert heard == [(1, 1), (1, 2), (1, 3), (1, 4), (2, 5), (2, 6), (2, 7), (2, 8)]
