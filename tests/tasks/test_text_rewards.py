"""The rewards `exact`, `choice` and `math_verify` on right, wrong, cut and empty responses."""

import importlib.util

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.config import RewardConfig
from megatron_fipo.errors import UserError
from megatron_fipo.tasks.math_verify import score_math_verify
from megatron_fipo.tasks.rewards import REWARDS
from megatron_fipo.tasks.task import NO_ANSWER, Problem, Score
from tests.completions import scored

EXACT, CHOICE = (REWARDS[name](RewardConfig()) for name in ("exact", "choice"))


def problem(truth: str) -> Problem:
    return Problem("p", (1,), "prompt", truth, "test")


@pytest.mark.parametrize(
    ("truth", "text", "answer", "right"),
    [
        ("New York", "It is\nAnswer: new  york.", "new york", 1),
        ("New York", "**Answer:** **New York**", "new york", 1),
        ("34", "so Answer: 35\nAnswer: 34", "34", 1),
        ("34", "Answer: 34\nAnswer: 35", "35", 0),
        ("34", "first\n34\n\n", "34", 1),
        ("34", "34\nthat is it", "that is it", 0),
        ("34", "Answer:", NO_ANSWER, 0),
        ("34", "", NO_ANSWER, 0),
        ("$5", "Answer: 5", "5", 1),
        ("0.5", "Answer: 0.50", "0.50", 0),
    ],
)
def test_exact_compares_the_final_answer_as_text(truth, text, answer, right):
    assert scored(EXACT.score, text, problem(truth)) == Score(right, right, answer)


def test_exact_takes_no_last_line_of_a_cut_response():
    assert scored(EXACT.score, "is 4", problem("is 4"), "length") == Score(0.0, 0.0, NO_ANSWER)
    assert scored(EXACT.score, "Answer: 4", problem("4"), "length").accuracy == 1


@pytest.mark.parametrize(
    ("truth", "text", "answer", "right"),
    [
        ("B", "Answer: B", "B", 1),
        ("(b)", "Answer: b", "B", 1),
        ("B", "**Answer:** (B) Paris", "B", 1),
        ("B", "Answer: $B$", "B", 1),
        ("B", r"thus \boxed{B}", "B", 1),
        ("B", r"thus \boxed{\text{(B)}}", "B", 1),
        ("B", r"Answer: $\boxed{B}$", "B", 1),
        ("B", "(A) is wrong, so it is (B)", "B", 1),
        ("B", "Answer: A\nAnswer: B", "B", 1),
        ("B", "Answer: A, not (B)", "A", 0),
        ("A", "Answer: A train", NO_ANSWER, 0),
        ("I", "Answer: I think (C)", "C", 0),
        ("B", "Answer: Because", NO_ANSWER, 0),
        ("B", "B", NO_ANSWER, 0),
        ("B", "", NO_ANSWER, 0),
        ("K", "Answer: K", None, 0),
    ],
)
def test_choice_reads_the_last_letter_that_is_marked(truth, text, answer, right):
    if answer is None:
        assert (
            CHOICE.obstacle(problem(truth))
            == "is not a letter from A to J; store the letter of the right choice"
        )
    else:
        assert CHOICE.obstacle(problem(truth)) is None
        assert scored(CHOICE.score, text, problem(truth)) == Score(right, right, answer)


@pytest.mark.parametrize(
    ("truth", "words"),
    [
        ("a\nb", "several lines"),
        ("Answer: 3", "the mark of an answer"),
        (" ** ", "is empty"),
        ("x" * 1001, "1,001 characters"),
    ],
)
def test_ground_truths_that_no_response_can_equal_are_obstacles(truth, words):
    assert words in EXACT.obstacle(problem(truth))


@given(st.text(max_size=200), st.sampled_from(["stop", "length"]))
def test_any_text_has_a_score(text, reason):
    for reward, truth in ((EXACT, "34"), (CHOICE, "B")):
        assert scored(reward.score, text, problem(truth), reason).accuracy in (0, 1)


@given(st.text(min_size=1, max_size=60))
def test_exact_finds_every_ground_truth_without_an_obstacle_right(truth):
    if EXACT.obstacle(problem(truth)) is None:
        assert scored(EXACT.score, f"Answer: {truth.strip()}", problem(truth)).accuracy == 1


installed = importlib.util.find_spec("math_verify") is not None


@pytest.mark.skipif(installed, reason="math-verify is installed")
def test_math_verify_says_what_to_install():
    with pytest.raises(
        UserError, match=r"needs the library math-verify .*pip install 'megatron-fipo\[math\]'"
    ):
        REWARDS["math_verify"](RewardConfig())


@pytest.mark.skipif(not installed, reason="math-verify is not installed")
class TestMathVerify:
    @pytest.mark.parametrize(
        ("truth", "text", "right"),
        [
            ("1/2", "Answer: 0.5", 1),
            ("0.5", r"so $\frac{1}{2}$", 1),
            (r"\frac12", r"\boxed{1/2}", 1),
            (r"2\sqrt{2}", r"\boxed{\sqrt{8}}", 1),
            ("x+1", "$1+x$", 1),
            ("34", r"first \boxed{35}, then \boxed{34}", 1),
            ("34", "Answer: 35", 0),
            ("34", "I do not know.", 0),
            ("34", "", 0),
        ],
    )
    def test_values_are_compared(self, truth, text, right):
        reward = REWARDS["math_verify"](RewardConfig())
        score = scored(reward.score, text, problem(truth))
        assert (score.reward, score.accuracy) == (right, right)
        assert (score.answer == NO_ANSWER) == ("know" in text or not text)

    def test_the_timer_of_the_scorer_stays(self):
        """The library's own limits would replace it."""
        import signal

        handler = signal.signal(signal.SIGALRM, signal.SIG_IGN)
        try:
            signal.setitimer(signal.ITIMER_REAL, 1000)
            scored(score_math_verify, r"\boxed{34}", problem("34"))
            assert signal.getitimer(signal.ITIMER_REAL)[0] > 900
            assert signal.getsignal(signal.SIGALRM) is signal.SIG_IGN
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)

    def test_a_ground_truth_that_it_cannot_read_is_an_error_not_a_zero(self):
        with pytest.raises(ValueError, match="reads no value in the ground truth"):
            scored(score_math_verify, r"\boxed{34}", problem("}{"))
