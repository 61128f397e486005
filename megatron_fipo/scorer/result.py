"""Whether what a reward function returned is a usable score. Pure."""

import json
import math
from typing import Any

from megatron_fipo.tasks.task import Score


def fault(result: Any) -> str | None:
    """What is wrong with the return value of a reward function, as the end of a sentence; None if nothing is.

    `reward` must be a finite number and `accuracy` 0 or 1 (int or float), `answer` text, and `extra` an
    object that JSON gives back unchanged, since scores are saved with the state of a run.
    """
    if not isinstance(result, Score):
        return f"returned {_shown(result)}, not a Score"
    if not _is_number(result.reward) or not math.isfinite(result.reward):
        return f"gave the reward {_shown(result.reward)}, not a finite number"
    if not _is_number(result.accuracy) or result.accuracy not in (0, 1):
        return f"gave the accuracy {_shown(result.accuracy)}, not 0 or 1"
    if not isinstance(result.answer, str) or not _is_unicode(result.answer):
        return f"gave the answer {_shown(result.answer)}, not valid text"
    if not isinstance(result.extra, dict) or not _is_json(result.extra):
        return f"gave {_shown(result.extra)} as extra, not an object of JSON values"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_json(value: Any) -> bool:
    try:
        return json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError, RecursionError):
        return False


def _shown(value: Any) -> str:
    """A value for a message, with its type, in at most about 60 characters of ASCII."""
    try:
        text = ascii(value)
    except Exception:  # the `__repr__` of an unknown object
        text = "an object"
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
