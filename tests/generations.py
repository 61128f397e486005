"""Generations and trajectories from plain numbers, and back, to compare them."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from megatron_fipo.engine.protocol import Generation


def generation(
    response_ids: Sequence[int], log_probs: Sequence[float], finish_reason: str, weight_version: int
) -> Generation:
    return Generation(
        np.array(response_ids, dtype=np.int32),
        np.array(log_probs, dtype=np.float32),
        finish_reason,
        weight_version,
    )


def ids(answer: Generation) -> tuple[int, ...]:
    return tuple(answer.response_ids.tolist())


def plain(value: Any) -> Any:
    """The value with arrays as their dtype, shape and bits, to compare with ==."""
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if is_dataclass(value) and not isinstance(value, type):
        return type(value).__name__, {
            field.name: plain(getattr(value, field.name)) for field in fields(value)
        }
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
