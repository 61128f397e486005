"""The DAPO reward agrees with every golden result of the published scorer and never raises."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.config import RewardConfig
from megatron_fipo.tasks import dapo_math
from megatron_fipo.tasks.rewards import REWARDS
from megatron_fipo.tasks.task import NO_ANSWER, Problem, Score
from tests.completions import scored

GOLDEN = [json.loads(line) for line in (Path(__file__).parents[1] / "golden" / "dapo_scorer.jsonl").open()]
REWARD = REWARDS["dapo_math"](RewardConfig())


def score(text: str, problem: Problem, finish_reason: str) -> Score:
    return scored(REWARD.score, text, problem, finish_reason)


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
    assert why in (REWARD.obstacle(problem(ground_truth)) or "")


@pytest.mark.parametrize(
    "ground_truth",
    ["34", " 34\n", "\\boxed{34}", "\\frac{1}{2}", "(1, 2]", "x=5", "3,000", "1" * 292, "-7", "A"],
)
def test_a_ground_truth_without_an_obstacle_is_matched_by_itself(ground_truth):
    assert REWARD.obstacle(problem(ground_truth)) is None
    assert score(f"So it is.\nAnswer: {ground_truth.strip()}", problem(ground_truth), "stop").accuracy == 1


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
    assert doubt in REWARD.doubt(problem(ground_truth))


@pytest.mark.parametrize(
    "ground_truth",
    ["0", "0.5", "34", "-7", r"\frac{1}{2}", "x<y", "(0, 1)", "A", r"\text{no real roots exist}", "..."],
)
def test_an_ordinary_answer_has_no_doubt(ground_truth):
    assert REWARD.doubt(problem(ground_truth)) is None


PUBLISHED = (
    (r".*?\$(.*?)\$.*", r"$\1$"),
    (r"\\text\{(.*?)\}", r"\1"),
    (r"\\textbf\{(.*?)\}", r"\1"),
    (r"\\overline\{(.*?)\}", r"\1"),
    (r"\\boxed\{(.*)\}", r"\1"),
    (r"frac([^{])(.)", r"frac{\1}{\2}"),
    (r"sqrt([^{])", r"sqrt{\1}"),
)
"""The expressions of the published normalization, which take quadratic time."""
PIECES = (
    *("\\text{", "\\textbf{", "\\overline{", "\\boxed{", "}", "$", "\n", "frac", "sqrt", "{", "a", "12"),
    *("\\text", "text{", "\r", "\u2028", "b ", ","),
)


@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
def test_normalization_is_the_published_one(text):
    def published(text: str) -> str:
        for pattern, replacement in PUBLISHED:
            text = re.sub(pattern, replacement, text)
        text = text.replace("$", "")
        return (text.replace(",", "") if text.replace(",", "").isdigit() else text).strip()

    prepared = text.split("=")[-1]
    for before, after in dapo_math._REPLACED:
        prepared = prepared.replace(before, after)
    for expression in dapo_math._REMOVED:
        prepared = prepared.replace(expression, "")
    assert dapo_math.normalize_answer(text) == published(prepared)


@given(
    st.lists(st.sampled_from(["ab", "c", " ", ",", "1", "\\", "{", "}", "é", "d e"]), max_size=25).map(
        "".join
    )
)
def test_a_sentence_is_four_words(text):
    four_words = re.match(r"([^\\{}]*\b[A-Za-z]{2,}[ ,]+){4}", text) is not None
    assert (dict(dapo_math._DOUBTS)["a sentence"].match(text) is not None) == four_words


@pytest.mark.parametrize(
    "text", ["\\text{", "\\textbf{", "\\overline{", "\\boxed{", "$\n", "x", "frac", "\\text{\\mathrm{"]
)
def test_a_long_answer_takes_time_in_proportion(text):
    """The published expressions would take minutes for each."""
    dapo_math.normalize_answer(text * 200_000)


def test_a_sentence_is_found_without_backtracking():
    assert dapo_math.dapo_math_doubt("ab" + (" " * 90 + "ab") * 3 + " " * 10000 + "1") == "a sentence"
    assert dapo_math.dapo_math_doubt(("ab" + " " * 9000) * 3 + "1") is None
