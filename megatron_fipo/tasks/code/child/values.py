"""Python values as JSON, so that a value that an answer returned can be compared outside its process."""

import json
from typing import Any


def plain(value: Any) -> Any:
    """The value as JSON: a tuple is a list, a set and a dictionary have an order.

    Raises TypeError for another type than these, numbers, text and None. Values of subclasses, such as numpy's float64, are
    converted by their base class; other numbers of numpy by their `item`.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return {"set": sorted((plain(item) for item in value), key=json.dumps)}
    if isinstance(value, dict):
        return {"dict": sorted(([plain(key), plain(item)] for key, item in value.items()), key=json.dumps)}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise TypeError(f"a value of type {type(value).__name__}")
