"""Rewards of the user's own in a scorer's process: sums, groups, rewards by data source, names of numbers, and failures."""

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from megatron_fipo.config import Config, load_config
from megatron_fipo.driver.tokenizer import checked_tokenizer
from megatron_fipo.errors import UserError
from megatron_fipo.scorer.child import ScorerChild
from megatron_fipo.scorer.protocol import Failure, FailureKind, FinishedResponse, ScoreRequest, ScorerSettings
from megatron_fipo.tasks.registry import load_datasets, rewards_of
from megatron_fipo.tasks.task import Problem, Score, TaskSettings

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples/countdown/base-model"
OWN = "tests.scorer.own_rewards"
SUM = f"{OWN}:score + 0.5*{OWN}:length"
GROUP = f"2*{OWN}:rank"
HUGE = f"1e308*{OWN}:score + 1e308*{OWN}:length"
NAMES = ("fails", "unnamed", "reserved", "ends", "lasts", "finds_torch")


def settings(*rewards: str) -> ScorerSettings:
    config = load_config(
        None, [f"model.path={MODEL}", "run_dir=r", "reward.timeout_s=2", "reward.memory_mb=4000"]
    )
    return replace(ScorerSettings.of(config, str(MODEL), rewards), hook_folder=str(ROOT))


@pytest.fixture(scope="module")
def scorer() -> Iterator[ScorerChild]:
    with ScorerChild(settings(SUM, GROUP, HUGE, *(f"{OWN}:{name}" for name in NAMES))) as child:
        yield child


def request(reward: str, *texts: str, truth: str = "42") -> ScoreRequest:
    tokenizer = checked_tokenizer(str(MODEL), False)
    problem = Problem("p7", (1,), "prompt", truth, "test", task=TaskSettings("aime24", reward))
    return ScoreRequest(
        0,
        problem,
        tuple(FinishedResponse(np.array(tokenizer.encode(text), np.int32), "stop") for text in texts),
    )


def failure(scorer: ScorerChild, name: str) -> Failure:
    result = scorer.score(request(f"{OWN}:{name}", "42")).result
    assert isinstance(result, Failure)
    return result


def test_a_sum_adds_weighted_rewards_and_keeps_accuracy_and_answer_of_its_first_term(scorer):
    result = scorer.score(request(SUM, "42", "1234")).result
    numbers = {"note": "text", "flag": True}
    assert result == [
        # `length` of the first term gives way to the reward of the term of that name
        Score(1.25, 1.0, "42", {"length": 0.5, "score": 1.0, **numbers}),
        Score(0.5, 0.0, "1234", {"length": 1.0, "score": 0.0, **numbers}),
    ]


def test_a_sum_that_no_float_can_hold_is_a_failure(scorer):
    found = scorer.score(request(HUGE, "4200" * 9 + "42")).result
    assert isinstance(found, Failure)
    assert found.kind is FailureKind.RESULT
    assert (
        "gave inf (float) as the weighted sum, not a finite number for a response to problem p7"
        in found.reason
    )


def test_a_group_is_scored_by_one_call(scorer):
    result = scorer.score(request(GROUP, "333", "1", "22")).result
    assert result == [Score(4.0, 1.0), Score(0.0, 0.0), Score(2.0, 1.0)]


def test_a_failure_has_the_row_with_its_set_and_the_traceback_of_the_user_s_code(scorer):
    found = failure(scorer, "fails")
    assert found.kind is FailureKind.RAISED
    assert found.reason == (
        f"the reward function {OWN}:fails raised KeyError ('missing') for response 1 of 1 to problem p7 of the set aime24"
    )
    lines = found.trace.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert "own_rewards.py" in lines[1]
    assert 'return {}["missing"]' in lines[2]
    assert lines[-1] == "KeyError: 'missing'"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unnamed", "gave a number in extra that must not have the name 'a b'; use at most 40 letters"),
        ("reserved", "gave a number in extra that must not have the name 'mean', which another metric has"),
    ],
)
def test_a_number_needs_a_name_that_a_metric_may_have(scorer, name, words):
    assert words in failure(scorer, name).reason


def test_a_reward_may_import_torch_when_it_is_called(scorer):
    assert scorer.score(request(f"{OWN}:finds_torch", "42")).result == [Score(1.0, 1.0)]


def test_a_process_that_ends_or_takes_too_long_is_a_failure_and_the_next_response_is_scored(scorer):
    assert failure(scorer, "ends").kind is FailureKind.DIED
    assert failure(scorer, "lasts").kind is FailureKind.TIME
    assert scorer.score(request(GROUP, "1")).result == [Score(0.0, 0.0)]


def test_a_reward_that_cannot_be_loaded_is_one_error():
    with (
        ScorerChild(settings("no.such.module:score")) as child,
        pytest.raises(UserError, match="there is no module no"),
    ):
        child.score(request("no.such.module:score", "42"))


def rows(path: Path, *sources: str) -> str:
    """A file of one row for each data source."""
    lines = [
        {"prompt": f"{index}+1:", "reward_model": {"ground_truth": str(index + 1)}, "data_source": source}
        for index, source in enumerate(sources)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_each_row_is_scored_by_the_reward_of_its_data_source_else_of_its_set(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config: Config = load_config(
        None,
        [
            f"model.path={MODEL}",
            "run_dir=r",
            "data.source=jsonl",
            f"data.train_path={rows(tmp_path / 'train.jsonl', 'a', 'b')}",
            f"evaluation.sets={{held: {{path: {rows(tmp_path / 'held.jsonl', 'a', 'b')}, reward: {OWN}:length}}}}",
            "reward.name=exact",
            f"reward.by_data_source={{b: {SUM}}}",
            "reward.memory_mb=4000",
        ],
    )
    tokenizer = checked_tokenizer(str(MODEL), False)
    train, held_out = load_datasets(config, tokenizer, datetime(2026, 1, 1), lambda _: None)
    problems = [*train.problems, *held_out["held"]]
    response = FinishedResponse(np.array(tokenizer.encode("2"), np.int32), "stop")
    found = []
    with ScorerChild(ScorerSettings.of(config, str(MODEL), rewards_of(problems))) as child:
        for problem in problems:
            result = child.score(ScoreRequest(0, problem, (response,))).result
            assert isinstance(result, list)
            found.append(result[0].reward)
    # exact: "2" is not 1. SUM: right, and 0.5 * 1/4. held: length 1/4, SUM again.
    assert found == [0.0, 1.125, 0.25, 1.125]
