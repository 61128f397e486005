"""The reward function `exact`: the final answer equals the ground truth as text.

The final answer is what follows the last `Answer:` on its line; in a finished response without that mark it is the last line.
"""

import re

from megatron_fipo.tasks.task import NO_ANSWER, Completion, Problem, Reward, Score

SEARCHED_CHARACTERS = 2000
"""The answer must be within the last characters of the response."""

_ANSWER = re.compile(r"(?i)answer[*_ \t]*:([^\n]*)")
_AROUND = " \t*_`\"'$"
"""Removed around an answer, in addition to a full stop at the end: markup and quotation marks."""


def score_exact(completion: Completion) -> Score:
    """1 if the final answer equals the ground truth after `normalize`, else 0."""
    answer = final_answer(completion.text, completion.finish_reason == "stop")
    if not answer:
        return Score(reward=0.0, accuracy=0.0, answer=NO_ANSWER)
    correct = float(answer == normalize(completion.problem.ground_truth))
    return Score(reward=correct, accuracy=correct, answer=answer)


def final_answer(text: str, finished: bool) -> str:
    """The final answer of a response, normalized; empty if it has none."""
    marked = _ANSWER.findall(text)
    if marked:
        return normalize(marked[-1])
    lines = text.strip().splitlines()
    return normalize(lines[-1]) if lines and finished else ""


def normalize(text: str) -> str:
    """An answer in lower case with single blanks, without markup, quotation marks and a full stop around it."""
    text = " ".join(text.split()).casefold().strip(_AROUND)
    return text.removesuffix(".").strip(_AROUND)


def exact_obstacle(problem: Problem) -> str | None:
    """Why no response can be right for this ground truth; None if one can."""
    truth = problem.ground_truth.strip()
    if len(truth.splitlines()) > 1:
        return "has several lines, but an answer is one line; store the final answer alone"
    if _ANSWER.search(truth):
        return "contains the mark of an answer (`Answer:`); store what comes after it"
    if not normalize(truth):
        return "is empty after normalization; store the value"
    if len(truth) > SEARCHED_CHARACTERS // 2:
        return f"has {len(truth):,} characters, above {SEARCHED_CHARACTERS // 2:,}; remove the problem"
    return None


EXACT = Reward(score_exact, exact_obstacle, reads_last=SEARCHED_CHARACTERS, reads_columns=False)
"""The reward `exact`."""
