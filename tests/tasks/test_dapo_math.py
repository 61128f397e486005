"""The DAPO reward agrees with every golden result of the published scorer and never raises."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.tasks.registry import reward
from megatron_fipo.tasks.task import NO_ANSWER, Problem

GOLDEN = [json.loads(line) for line in (Path(__file__).parents[1] / "golden" / "dapo_scorer.jsonl").open()]
score = reward("dapo_math").score


def problem(ground_truth: str) -> Problem:
    return Problem("0", (1,), "", ground_truth, "math_dapo")


def test_all_golden_rows_agree():
    assert len(GOLDEN) == 400
    assert {row["score"] for row in GOLDEN} == {1.0, -1.0}
    for row in GOLDEN:
        result = score(row["response"], problem(row["ground_truth"]), "stop")
        assert (result.reward, bool(result.accuracy), result.answer) == (
            row["score"],
            row["acc"],
            row["pred"],
        ), row


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("so x. Answer: 12", "12"),
        ("Answer: 1\nAnswer: 2", "2"),
        ("ANSWER :\n 1,024 dollars", "1024"),
        ("Answer: \\boxed{\\frac12}", "\\frac{1}{2}"),
        ("Answer: $x = 5$", "5"),
        ("Answer: 7" + "!" * 300, NO_ANSWER),
        ("The result is 12", NO_ANSWER),
    ],
)
def test_what_counts_as_the_answer(response, answer):
    assert score(response, problem("12"), "length").answer == answer


def test_the_value_is_compared_as_a_string_only():
    assert score("Answer: 0.5", problem("1/2"), "stop").reward == -1.0
    assert score("Answer: 1/2", problem("1/2"), "stop").reward == 1.0


@given(
    st.text(max_size=400)
    | st.text(alphabet="Answer: $\\frac{}text=,1\n", max_size=400).map("Answer: ".__add__),
    st.text(),
)
def test_it_never_raises(response, ground_truth):
    result = score(response, problem(ground_truth), "stop")
    assert (result.reward, result.accuracy) in {(1.0, 1.0), (-1.0, 0.0)}


@pytest.mark.parametrize(
    ("ground_truth", "why"),
    [
        ("First 12.\nThen 34", "several lines"),
        ("1" * 293, "has 293 characters"),
        ("\\text{" * 20_000, "has 120,000 characters"),
        ("#### 34", "mark of an answer"),
        ("So it is 12 #### 34", "mark of an answer"),
        ("Answer: 34", "mark of an answer"),
        ("answer : 34", "mark of an answer"),
        ("2a ", "its blanks at the end"),
        ("x + a  ", "its blanks at the end"),
        ("[INVALID]", "stands for a response without an answer"),
        ("34\u200b", "invisible characters"),
        ("\ufeff34", "invisible characters"),
        ("$", "empty after normalization"),
        ("km", "empty after normalization"),
        ("\\text{}^2", "empty after normalization"),
    ],
)
def test_a_ground_truth_that_no_response_can_match_is_named(ground_truth, why):
    assert why in reward("dapo_math").obstacle(ground_truth)


@pytest.mark.parametrize(
    "ground_truth",
    ["34", " 34\n", "\\boxed{34}", "\\frac{1}{2}", "(1, 2]", "x=5", "3,000", "1" * 292, "-7", "A"],
)
def test_a_ground_truth_without_an_obstacle_is_matched_by_itself(ground_truth):
    assert reward("dapo_math").obstacle(ground_truth) is None
    problem = Problem("p", (1,), "", ground_truth, "math")
    assert score(f"So it is.\nAnswer: {ground_truth.strip()}", problem, "stop").accuracy == 1


@pytest.mark.parametrize(
    ("ground_truth", "doubt"),
    [
        ("073", "zero"),
        ("34.", "full stop"),
        (r"\(34\)", "delimiters"),
        ("**34**", "delimiters"),
        ("<answer>34</answer>", "delimiters"),
        ("We get two apples, so 34", "sentence"),
        ("\u221234", "another script"),
        ("\uff13\uff14", "another script"),
    ],
)
def test_an_answer_that_a_model_writes_differently_has_a_doubt(ground_truth, doubt):
    assert doubt in reward("dapo_math").doubt(ground_truth)


@pytest.mark.parametrize(
    "ground_truth",
    ["0", "0.5", "34", "-7", r"\frac{1}{2}", "x<y", "(0, 1)", "A", r"\text{no real roots exist}", "..."],
)
def test_an_ordinary_answer_has_no_doubt(ground_truth):
    assert reward("dapo_math").doubt(ground_truth) is None
