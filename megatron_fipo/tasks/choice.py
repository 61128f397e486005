r"""The reward function `choice`: the letter of a multiple-choice question.

The choice is the last of `Answer: B` and `\boxed{B}`; in a response with neither it is the last `(B)`.
"""

import re

from megatron_fipo.tasks.task import NO_ANSWER, Completion, Problem, Reward, Score

SEARCHED_CHARACTERS = 1000
"""The choice must be within the last characters of the response."""

_MARKED = re.compile(
    r"(?i)(?:answer[*_ \t]*:[*_ \t$(\[]*(?:\\boxed\{|\\text\{|\\textbf\{)*|\\boxed\{(?:\\text\{|\\textbf\{)?\(?)([a-j])(?![a-z0-9])"
    r"(?!(?<=[ai])[ \t]+(?-i:[a-z]))"  # `Answer: A train`, `Answer: I think` name no choice
)
_BRACKETED = re.compile(r"\(([A-J])\)")
_TRUTH = re.compile(r"\s*\(?([A-Ja-j])\)?\s*")


def score_choice(completion: Completion) -> Score:
    """1 if the choice is the ground truth, else 0. Raises `ValueError` for a ground truth with a `choice_obstacle`."""
    truth = _TRUTH.fullmatch(completion.problem.ground_truth)
    if truth is None:
        raise ValueError(
            f"the ground truth {completion.problem.ground_truth!r:.60} is not a letter from A to J"
        )
    found = _MARKED.findall(completion.text) or _BRACKETED.findall(completion.text)
    if not found:
        return Score(reward=0.0, accuracy=0.0, answer=NO_ANSWER)
    answer = found[-1].upper()
    correct = float(answer == truth[1].upper())
    return Score(reward=correct, accuracy=correct, answer=answer)


def choice_obstacle(problem: Problem) -> str | None:
    """Why no response can be right for this ground truth; None if one can."""
    if _TRUTH.fullmatch(problem.ground_truth) is None:
        return "is not a letter from A to J; store the letter of the right choice"
    return None


CHOICE = Reward(score_choice, choice_obstacle, reads_last=SEARCHED_CHARACTERS, reads_columns=False)
"""The reward `choice`."""
