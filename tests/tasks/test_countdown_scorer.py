"""The countdown scorer follows the rules of the task exactly, for any text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.config import RewardConfig
from megatron_fipo.tasks.rewards import REWARDS
from megatron_fipo.tasks.task import NO_ANSWER, Problem, Score
from tests.completions import scored

REWARD = REWARDS["countdown"](RewardConfig())


def score(text: str, problem: Problem, finish_reason: str) -> Score:
    return scored(REWARD.score, text, problem, finish_reason)


def problem(ground_truth: str = "3,7,5=26") -> Problem:
    return Problem("p", (1,), f"{ground_truth}:", ground_truth, "countdown")


@pytest.mark.parametrize(
    "response", ["#3*7+5", "3*7=21+5=26;#3*7+5", "nonsense ;;#3*7+5", "3+7=10-5=5;3*7=21+5=26;#3*7+5"]
)
def test_right_answers(response):
    assert score(response, problem(), "stop") == Score(1.0, 1.0, "26")


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("#3+7*5", "50"),  # strictly left to right
        ("#3-7-5", "-9"),
        ("3*7+5", NO_ANSWER),
        ("##3*7+5", NO_ANSWER),
        ("#3*7+5#3*7+5", NO_ANSWER),
        ("#3*7+5;", NO_ANSWER),
        ("# 3*7+5", NO_ANSWER),
        ("#3*7+5\n", NO_ANSWER),
        ("#3*7", NO_ANSWER),
        ("#3*7+5+0", NO_ANSWER),
        ("#3*7+6-1", NO_ANSWER),
        ("#3*7+6", NO_ANSWER),
        ("#3*3+5", NO_ANSWER),
        ("#7*3+5", NO_ANSWER),  # not the order given
        ("#3*7**5", NO_ANSWER),
        ("#٣*7+5", NO_ANSWER),
        ("#26", NO_ANSWER),
        ("", NO_ANSWER),
    ],
)
def test_wrong_answers(response, answer):
    assert score(response, problem(), "stop") == Score(0.0, 0.0, answer)


def test_precedence_is_not_the_school_rule():
    assert score("#3+7*5", problem("3,7,5=50"), "stop").reward == 1.0
    assert score("#3+7*5", problem("3,7,5=38"), "stop").reward == 0.0


def test_a_truncated_response_is_wrong_and_has_no_vote():
    assert score("#3*7+5", problem(), "length") == Score(0.0, 0.0, NO_ANSWER)


@given(
    st.text(max_size=60) | st.text(alphabet="#3579+-*=;", max_size=30), st.sampled_from(["stop", "length"])
)
def test_it_never_raises(response, finish_reason):
    assert score(response, problem(), finish_reason).reward in {0.0, 1.0}


def test_four_numbers_need_an_expression_of_four():
    assert score("#3*7+5*2", problem("3,7,5,2=52"), "stop") == Score(1.0, 1.0, "52")
    assert score("#3*7+5+2", problem("3,7,5,2=52"), "stop") == Score(0.0, 0.0, "28")
    assert score("#3*7+5", problem("3,7,5,2=26"), "stop") == Score(0.0, 0.0, NO_ANSWER)
    assert score("#3*7+5*2", problem("3,7,5=52"), "stop") == Score(0.0, 0.0, NO_ANSWER)


@pytest.mark.parametrize(
    "ground_truth", ["26", "", "3,7,5=0", "3,7=21", "3,7,5=126", "10,7,5=26", "1,1,1,1,1=5"]
)
def test_a_ground_truth_that_is_no_countdown_problem_has_an_obstacle(ground_truth):
    assert "3,7,5=26" in (REWARD.obstacle(problem(ground_truth)) or "")
    assert REWARD.obstacle(problem("3,7,5=26")) is None
    assert "no solution" in (REWARD.obstacle(problem("1,1,1=99")) or "")
