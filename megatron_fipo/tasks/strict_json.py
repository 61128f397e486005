"""JSON without silent choices."""

import json
from typing import Any


def loads(text: str) -> Any:
    """The value of a JSON text. Raises `ValueError` also for a key twice in one object, and for thousands of
    nested brackets; `json` alone would keep the last of two values, and raise `RecursionError`.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {repeated!a} is twice in one object")
    return values
