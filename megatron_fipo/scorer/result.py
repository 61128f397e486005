"""Whether what a reward function returned is a usable score, and how it is named if it is not. Pure."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from megatron_fipo.errors import one_line, shown
from megatron_fipo.tasks.named_numbers import is_finite_number, named_numbers, number_name_fault
from megatron_fipo.tasks.rewards import Term
from megatron_fipo.tasks.task import Score

MAX_CHARACTERS = 2**20
"""Of `answer` and the JSON of `extra` together: the driver keeps those of all waiting groups."""
MAX_NESTING = 32
"""Of objects and lists in `extra`, far below where Python's own functions for saving them fail."""


class UnusableResultError(Exception):
    """What a reward function returned is no score. The message is the end of a sentence about it."""


def plain_score(result: Any) -> Score:
    """The score with values of exactly float, str and what JSON gives. Raises `UnusableResultError`.

    A number alone is a reward, and accurate if it is above 0.

    `reward` must be a finite number and `accuracy` 0 or 1 (int or float), `answer` text, and `extra` an
    object that JSON gives back unchanged, since scores are saved with the state of a run; its numbers need names that
    metrics may have. Raises any other error of a value that raises when it is read.
    """
    if is_finite_number(result):
        reward = float(result)
        return Score(reward, accuracy=float(reward > 0))
    if not isinstance(result, Score):
        raise UnusableResultError(f"returned {shown(result)}, not a finite number or a Score")
    if not is_finite_number(result.reward):
        raise UnusableResultError(f"gave the reward {shown(result.reward)}, not a finite number")
    if not is_finite_number(result.accuracy) or result.accuracy not in (0, 1):
        raise UnusableResultError(f"gave the accuracy {shown(result.accuracy)}, not 0 or 1")
    if type(result.answer) is not str or not _is_unicode(result.answer):
        raise UnusableResultError(f"gave the answer {shown(result.answer)}, not valid text")
    text = _as_json(result.extra)
    if text is None:
        raise UnusableResultError(
            f"gave {shown(result.extra)} as extra, not an object of JSON values nested at most {MAX_NESTING} deep"
        )
    size = len(result.answer) + len(text)
    if size > MAX_CHARACTERS:
        raise UnusableResultError(f"gave answer and extra of {size:,} characters, above {MAX_CHARACTERS:,}")
    extra = json.loads(text)
    for name in named_numbers(extra):
        if (fault := number_name_fault(name)) is not None:
            raise UnusableResultError(f"gave a number in extra that {fault}")
    return Score(float(result.reward), float(result.accuracy), result.answer, extra)


def plain_scores(results: Any, count: int) -> list[Score]:
    """`plain_score` of each of `count` results of a function that scores a group. Raises `UnusableResultError`."""
    if not isinstance(results, Sequence) or len(results) != count:
        given = f"{len(results)}" if isinstance(results, Sequence) else shown(results)
        raise UnusableResultError(f"returned {given}, not a list of {count} scores")
    return [plain_score(result) for result in results]


def total(terms: Sequence[Term], scores: Sequence[Score]) -> Score:
    """The score of one response by a sum of rewards, with accuracy and answer of the first term.

    Each term's own reward, without its weight, is in `extra` as `Term.metric`, unless it is alone. Of other values with the
    same name that of the first term counts. Raises `UnusableResultError` if the sum is above what a float can hold.
    """
    reward = sum(term.weight * score.reward for term, score in zip(terms, scores, strict=True))
    if not is_finite_number(reward):
        raise UnusableResultError(f"gave {shown(reward)} as the weighted sum, not a finite number")
    if len(terms) == 1:
        return replace(scores[0], reward=reward)
    extra = {key: value for score in reversed(scores) for key, value in score.extra.items()}
    extra |= {term.metric: score.reward for term, score in zip(terms, scores, strict=True)}
    return replace(scores[0], reward=reward, extra=extra)


def shown_error(error: BaseException) -> str:
    """An exception for a message, in at most about 300 printable characters."""
    name = type(error).__name__
    try:
        text = one_line(error)
    except Exception:  # the `__str__` of an unknown exception
        text = "without a message"
    text = text.encode(errors="backslashreplace").decode()
    return f"{name} ({text if len(text) <= 250 else text[:247] + '...'})"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _as_json(value: Any) -> str | None:
    """The JSON text of an object; None if it is not one, is nested too deep, or JSON gives back another."""
    try:
        text = json.dumps(value, allow_nan=False)
        copy = json.loads(text)
        same = isinstance(value, dict) and copy == value
    except (TypeError, ValueError, RecursionError):
        return None
    return text if same and _nesting(copy) <= MAX_NESTING else None


def _nesting(value: Any) -> int:
    """How deep objects and lists are nested."""
    depth, level = 0, [value]
    while level := [child for item in level if isinstance(item, dict | list) for child in _children(item)]:
        depth += 1
    return depth


def _children(item: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return item.values() if isinstance(item, dict) else item
