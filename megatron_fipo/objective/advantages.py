"""Advantages from rewards, within groups of responses to the same prompt. Host arithmetic, numpy."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

EPSILON = 1e-6
"""Added to the standard deviation."""


def group_advantages(rewards: ArrayLike, group_ids: Sequence[str] | np.ndarray) -> np.ndarray:
    """(R − mean) / (std + 1e-6) within each group: float64 [N] from rewards [N] and group ids [N], in any order.

    The standard deviation is the unbiased one. A group of one has no spread: mean 0 and std 1 are used.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if values.ndim != 1 or len(values) != len(group_ids):
        raise ValueError(f"rewards {list(values.shape)} and {len(group_ids)} group ids must both be [N]")
    _, group, size = np.unique(np.asarray(group_ids), return_inverse=True, return_counts=True)
    mean = np.bincount(group, weights=values) / size
    deviation = values - mean[group]
    variance = np.bincount(group, weights=deviation**2) / np.maximum(size - 1, 1)
    alone = size == 1
    mean, std = np.where(alone, 0.0, mean), np.where(alone, 1.0, np.sqrt(variance))
    return (values - mean[group]) / (std[group] + EPSILON)


def overlong_penalty(length: ArrayLike, max_length: int, buffer: int, factor: float) -> np.ndarray:
    """Penalty of a long response: 0 up to max_length − buffer tokens, then linear down to −factor at max_length.

    `length` may be a number or an array. A buffer of 0 means no penalty.
    """
    if not 0 <= buffer <= max_length:
        raise ValueError(
            f"overlong buffer must be between 0 and the maximum length {max_length}, not {buffer}"
        )
    excess = np.asarray(length, dtype=np.float64) - (max_length - buffer)
    return np.minimum(-excess / buffer * factor, 0.0) if buffer else np.zeros_like(excess)


def is_informative(accuracies: ArrayLike) -> bool:
    """Whether dynamic sampling keeps a group: its accuracies [n] differ (else every advantage is 0), or it is a group of one."""
    values = np.asarray(accuracies, dtype=np.float64)
    return values.size == 1 or bool((values != values[:1]).any())
