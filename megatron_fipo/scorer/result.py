"""Whether what a reward function returned is a usable score, and how it is named if it is not. Pure."""

import json
import sys
from collections.abc import Iterable
from typing import Any

from megatron_fipo.errors import one_line
from megatron_fipo.tasks.task import Score

MAX_CHARACTERS = 2**20
"""Of `answer` and the JSON of `extra` together: the driver keeps those of all waiting groups."""
MAX_NESTING = 32
"""Of objects and lists in `extra`, far below where Python's own functions for saving them fail."""


class UnusableResultError(Exception):
    """What a reward function returned is no score. The message is the end of a sentence about it."""


def plain_score(result: Any) -> Score:
    """The same score with values of exactly float, str and what JSON gives. Raises `UnusableResultError`.

    `reward` must be a finite number and `accuracy` 0 or 1 (int or float), `answer` text, and `extra` an
    object that JSON gives back unchanged, since scores are saved with the state of a run. Raises any other
    error of a value that raises when it is read.
    """
    if not isinstance(result, Score):
        raise UnusableResultError(f"returned {_shown(result)}, not a Score")
    if not _is_number(result.reward):
        raise UnusableResultError(f"gave the reward {_shown(result.reward)}, not a finite number")
    if not _is_number(result.accuracy) or result.accuracy not in (0, 1):
        raise UnusableResultError(f"gave the accuracy {_shown(result.accuracy)}, not 0 or 1")
    if type(result.answer) is not str or not _is_unicode(result.answer):
        raise UnusableResultError(f"gave the answer {_shown(result.answer)}, not valid text")
    text = _as_json(result.extra)
    if text is None:
        raise UnusableResultError(
            f"gave {_shown(result.extra)} as extra, not an object of JSON values nested at most {MAX_NESTING} deep"
        )
    size = len(result.answer) + len(text)
    if size > MAX_CHARACTERS:
        raise UnusableResultError(f"gave answer and extra of {size:,} characters, above {MAX_CHARACTERS:,}")
    return Score(float(result.reward), float(result.accuracy), result.answer, json.loads(text))


def shown_error(error: BaseException) -> str:
    """An exception for a message, in at most about 300 printable characters."""
    name = type(error).__name__
    try:
        text = one_line(error)
    except Exception:  # the `__str__` of an unknown exception
        text = "without a message"
    text = text.encode(errors="backslashreplace").decode()
    return f"{name} ({text if len(text) <= 250 else text[:247] + '...'})"


def _is_number(value: Any) -> bool:
    """Whether it is an int or float that a float can hold, and finite."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max


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


def _shown(value: Any) -> str:
    """A value for a message, with its type, in at most about 60 characters of ASCII."""
    try:
        text = ascii(value)
    except Exception:  # the `__repr__` of an unknown object
        text = "an object"
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
