"""Dynamic sampling: generate and score groups until enough of them say something; the rest waits for the next iteration."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from megatron_fipo.batching.trajectory import Trajectory
from megatron_fipo.config import RolloutConfig
from megatron_fipo.data.dataset import Dataset
from megatron_fipo.data.problem import Problem
from megatron_fipo.errors import UserError
from megatron_fipo.objective.advantages import is_informative, overlong_penalty
from megatron_fipo.reward.score import Scorer
from megatron_fipo.rollout.pool import RoundResult
from megatron_fipo.rollout.protocol import RAY_LOGS, Generation, GenerationRequest, SamplingParams

Group = list[Trajectory]
"""The responses to one prompt, of one weight version."""


class Pool(Protocol):
    """What the collector needs of `pool.EnginePool`."""

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: SamplingParams,
        version: int,
        on_finished: Callable[[int], None] | None = None,
    ) -> RoundResult: ...


class Progress(Protocol):
    def __call__(self, rounds: int, finished_groups: int) -> None:
        """The current round (from 1) and the groups generated in this iteration so far, informative or not."""


@dataclass(frozen=True)
class GroupScorer:
    """Turns a problem and its responses into a scored group."""

    scorer: Scorer
    decode: Callable[[Sequence[int]], str]
    """Token ids to text, special tokens left out."""
    max_response_length: int
    overlong_buffer: int
    overlong_factor: float

    def __call__(self, problem: Problem, group_id: str, generations: Sequence[Generation]) -> Group:
        """`reward` is the score plus the overlong penalty; `accuracy` is the score's own."""
        return [self._trajectory(problem, group_id, generation) for generation in generations]

    def _trajectory(self, problem: Problem, group_id: str, generation: Generation) -> Trajectory:
        length = len(generation.response_ids)
        score = self.scorer(self.decode(generation.response_ids), problem, generation.finish_reason)
        penalty = float(overlong_penalty(length, self.max_response_length, self.overlong_buffer, self.overlong_factor))
        return Trajectory(
            group_id=group_id,
            prompt_ids=list(problem.prompt_ids),
            response_ids=list(generation.response_ids),
            response_mask=[1] * length,
            rollout_log_probs=list(generation.log_probs),
            weight_version=generation.weight_version,
            finish_reason=generation.finish_reason,
            reward=score.reward + penalty,
            accuracy=score.accuracy,
            extra={"problem_id": problem.problem_id, "answer": score.answer, **score.extra},
        )


@dataclass
class CollectCounts:
    """Where the groups of one iteration went. `prompts` = `informative` + `all_right` + `all_wrong` + `failed`."""

    rounds: int = 0
    """Generation rounds used; 0 where the surplus of the last iteration sufficed."""
    prompts: int = 0
    """Prompts sent to the engines."""
    informative: int = 0
    """Newly generated groups that dynamic sampling keeps, used now or left as surplus."""
    all_right: int = 0
    all_wrong: int = 0
    failed: int = 0
    """Groups dropped because a response failed more often than `max_retries` allows; never scored."""
    retries: int = 0
    """Requests sent again."""
    from_surplus: int = 0
    """Groups of earlier iterations used now."""
    stale: int = 0
    """Groups of earlier iterations dropped as older than `max_staleness`."""
    generated_tokens: int = 0
    """Response tokens of the newly generated groups."""


@dataclass
class Collected:
    groups: list[Group]
    """At most `target_groups`, surplus of earlier iterations first; fewer where the rounds ran out."""
    surplus: list[Group]
    """Informative groups too many for this iteration, oldest first; the next call takes them."""
    counts: CollectCounts


def collect_iteration(
    dataset: Dataset,
    pool: Pool,
    score_group: Callable[[Problem, str, Sequence[Generation]], Group],
    config: RolloutConfig,
    *,
    target_groups: int,
    responses_per_prompt: int,
    surplus: Sequence[Group],
    version: int,
    seed: int,
    progress: Progress | None = None,
) -> Collected:
    """Gather the groups that one iteration trains on.

    Surplus groups at most `config.max_staleness` versions old are used first. Then rounds of `config.prompts_per_round` prompts
    follow until `target_groups` groups are informative (their accuracies differ) or `config.max_generation_rounds` are spent.
    Request seeds are hashes of (run seed, weight version, problem, place in the iteration), so the same call gives the same
    groups however many engines share the work. Raises `UserError` where not one group is informative.
    """
    kept = [group for group in surplus if version - group[0].weight_version <= config.max_staleness]
    counts = CollectCounts(from_surplus=min(len(kept), target_groups), stale=len(surplus) - len(kept))
    sampling = SamplingParams(config.temperature, config.top_p, config.max_response_length)
    while len(kept) < target_groups and counts.rounds < config.max_generation_rounds:
        counts.rounds += 1
        problems = dataset.take(config.prompts_per_round)
        first = counts.prompts
        group_ids = [f"{version}-{first + place}-{problem.problem_id}" for place, problem in enumerate(problems)]
        requests = [
            GenerationRequest(group_id, problem.prompt_ids, responses_per_prompt, request_seed(seed, group_id))
            for group_id, problem in zip(group_ids, problems, strict=True)
        ]
        counts.prompts += len(problems)
        result = pool.generate(requests, sampling, version, _round_progress(progress, counts.rounds, first))
        counts.retries += result.retries
        for problem, group_id, generations in zip(problems, group_ids, result.generations, strict=True):
            group = None if generations is None else score_group(problem, group_id, generations)
            if _count(group, counts) and group is not None:
                kept.append(group)
    if not kept:
        raise UserError(_nothing_informative(counts))
    return Collected(kept[:target_groups], kept[target_groups:], counts)


def request_seed(seed: int, request_id: str) -> int:
    """A seed in [0, 2^63) that depends on the run's seed and the request's name only."""
    return int.from_bytes(hashlib.blake2b(f"{seed}|{request_id}".encode(), digest_size=8).digest(), "big") >> 1


def groups_to_json(groups: Sequence[Group]) -> list[list[dict[str, Any]]]:
    """Surplus groups as plain JSON values (floats keep every bit), for the saved state of a run."""
    return [[asdict(trajectory) for trajectory in group] for group in groups]


def groups_from_json(state: Sequence[Sequence[dict[str, Any]]]) -> list[Group]:
    """The inverse of `groups_to_json`."""
    return [[Trajectory(**fields) for fields in group] for group in state]


def _count(group: Group | None, counts: CollectCounts) -> bool:
    """Book one generated group (None: failed); True where it is informative."""
    if group is None:
        counts.failed += 1
        return False
    counts.generated_tokens += sum(trajectory.response_length for trajectory in group)
    if is_informative([trajectory.accuracy for trajectory in group]):
        counts.informative += 1
        return True
    if group[0].accuracy > 0:
        counts.all_right += 1
    else:
        counts.all_wrong += 1
    return False


def _round_progress(progress: Progress | None, rounds: int, before: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    return lambda finished: progress(rounds, before + finished)


def _nothing_informative(counts: CollectCounts) -> str:
    if counts.failed == counts.prompts:
        return f"all {counts.prompts} rollout requests failed in {counts.rounds} rounds; see {RAY_LOGS}"
    return (
        f"none of {counts.prompts} prompts in {counts.rounds} generation rounds got both right and wrong answers "
        f"({counts.all_right} all right, {counts.all_wrong} all wrong, {counts.failed} failed), so nothing can be learnt: "
        "choose problems nearer to the model's ability, or raise batch.responses_per_prompt or rollout.max_generation_rounds"
    )
