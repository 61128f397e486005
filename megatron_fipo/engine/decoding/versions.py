"""Differences between versions of transformers. Does not import it."""

import inspect
from typing import Any


def cache_argument(model: Any) -> str:
    """What the model's forward calls its KV cache: `cache`, in older versions `past_key_values`."""
    parameters = inspect.signature(model.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"
