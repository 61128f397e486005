"""Answers that are all wrong are reported with an example: hard problems and wrong data look the same in numbers."""

import numpy as np
import pytest

from megatron_fipo.config import EvaluationConfig
from megatron_fipo.driver.all_wrong import REPORT_AFTER_GROUPS, AllWrongWatch, WrongResponse
from megatron_fipo.driver.evaluation import evaluate
from megatron_fipo.errors import UserError
from megatron_fipo.scorer.protocol import FinishedResponse, ScoreRequest
from megatron_fipo.tasks.dapo_math import score_dapo_math
from megatron_fipo.tasks.task import NO_ANSWER, Problem, Score
from tests.completions import scored
from tests.driver.collecting import make, until_enough
from tests.driver.toy_pool import ToyPool
from tests.generations import generation


def watched(groups: str) -> list[str]:
    """What is logged for groups that are wrong (w) or have a right response (r)."""
    logged: list[str] = []
    watch = AllWrongWatch(lambda ids: f"text {ids}", logged.append)
    for number, group in enumerate(groups):
        problem = Problem(f"p{number}", (1,), "?", "34", "math")
        responses = (FinishedResponse(np.int32([number]), "stop"),)
        watch.finished(ScoreRequest(number, problem, responses), [Score(0.0, float(group == "r"), "35")])
    return logged


@pytest.mark.parametrize("groups", ["w" * 31, "r" + "w" * 99, "w" * 31 + "r" + "w" * 99, ""])
def test_a_run_with_a_right_response_is_left_in_peace(groups):
    assert watched(groups) == []


def test_the_first_groups_all_wrong_are_reported_once_with_an_example():
    (line,) = watched("w" * 100)
    assert line == (
        f"no response to the first {REPORT_AFTER_GROUPS} prompts is right; for example, a response to problem p31 ends "
        "in 'text [31]'; the answer read is '35', and the ground truth is '34'. If that response should be right, the "
        "cause is the data or reward.name, not the model"
    )


def test_an_example_states_a_missing_answer_and_a_cut_response():
    text = str(WrongResponse("p", "34.0", "x" * 500 + "\n\x1b[31m end", NO_ANSWER, truncated=True))
    assert "a response to problem p, cut at its limit of tokens, ends in 'xxx" in text
    assert "no valid answer was found in it" in text
    assert len(text) < 500
    assert text.isprintable()


def test_the_collector_reports_a_run_without_right_responses():
    logged: list[str] = []
    collector = make(ToyPool(["wrong"]), max_prompts=40, log=logged.append)
    collector.resume(0)
    until_enough(collector)
    (line,) = logged
    assert line.startswith(
        "no response to the first 32 prompts is right; for example, a response to problem p"
    )
    assert collector.progress == "0 of 3 groups; 40 prompts, of which 0 all right, 40 all wrong, 0 unfinished"
    with pytest.raises(
        UserError, match=r"none of 40 prompts .* the ground truth is 'x'\. If that response should"
    ):
        collector.pop_batch()


def test_the_collector_is_silent_once_a_response_is_right():
    logged: list[str] = []
    collector = make(ToyPool(["right"] + ["wrong"] * 60), max_prompts=50, log=logged.append)
    collector.resume(0)
    until_enough(collector)
    assert logged == []


@pytest.mark.parametrize(("answer", "reported"), [("Answer: 34", False), ("Answer: 35", True)])
def test_an_evaluation_without_a_right_response_has_an_example(answer, reported):
    def score(requests):
        return [
            [scored(score_dapo_math, answer, r.problem, response.finish_reason) for response in r.responses]
            for r in requests
        ]

    evaluation = evaluate(
        lambda groups: [generation((1,), (0.0,), "length", 0) for group in groups for _ in group.requests],
        score,
        {"one": [Problem(f"p{i}", (1,), "?", "34", "math") for i in range(3)]},
        lambda _: answer,
        EvaluationConfig(samples_per_problem=2),
        max_new_tokens=9,
        seed=1,
    )
    assert (evaluation.all_wrong is not None) == reported
    if reported:
        assert "none of the 6 held-out responses is right" in evaluation.all_wrong
        assert "cut at its limit of tokens" in evaluation.all_wrong
        assert "the answer read is '35', and the ground truth is '34'" in evaluation.all_wrong
