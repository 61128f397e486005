"""Assignment of sequences to micro-batches, and of micro-batches to data-parallel ranks.

Host arithmetic only.
"""

from collections.abc import Sequence

import numpy as np

MicroBatch = list[int]
"""Indices into the sequences, rising."""
Packing = list[list[MicroBatch]]
"""[data-parallel rank][micro-batch]."""

ATTENTION_CROSSOVER = 49152.0
"""Sequence length at which causal attention costs as much as all matrices of a layer: about 12 x hidden size
(4,096)."""


def padded_lengths(lengths: Sequence[int] | np.ndarray, length_multiple: int) -> np.ndarray:
    """`lengths` rounded up to `length_multiple`, int64."""
    return -(-np.asarray(lengths, dtype=np.int64) // length_multiple) * length_multiple


def sequence_cost(lengths: np.ndarray, attention_crossover: float = ATTENTION_CROSSOVER) -> np.ndarray:
    """Work of each sequence, float64: L + L^2 / crossover. The unit is the work of one token in the matrices.

    The matrices of a layer take about 24 H^2 floating point operations per token and causal attention 2 L H,
    so the two are equal at L = 12 H.
    """
    lengths = np.asarray(lengths, dtype=np.float64)
    return lengths + lengths**2 / attention_crossover


def micro_batch_multiple(
    pipeline_model_parallel_size: int, virtual_pipeline_model_parallel_size: int | None
) -> int:
    """The number of micro-batches per rank must be a multiple of this for Megatron's schedule.

    The interleaved schedule processes micro-batches in groups of one per stage and refuses an incomplete
    group.
    """
    return pipeline_model_parallel_size if virtual_pipeline_model_parallel_size else 1


def plan_micro_batches(
    lengths: Sequence[int],
    *,
    data_parallel_size: int,
    token_budget: int,
    length_multiple: int,
    pack_multiple: int = 1,
    count_multiple: int = 1,
    attention_crossover: float = ATTENTION_CROSSOVER,
) -> Packing:
    """Pack sequences into micro-batches of at most `token_budget` padded tokens, equally many on every rank.

    The number is the smallest multiple of `count_multiple` (see `micro_batch_multiple`) for which the
    balanced greedy assignment below, or else best-fit decreasing, fits. Within it, sequences are assigned
    longest first to the cheapest micro-batch with enough space, and micro-batches costliest first to the
    cheapest rank. Work is therefore even over micro-batches and over ranks. A micro-batch is empty only if
    there are fewer sequences than micro-batches. The result is deterministic. On each rank the costliest
    micro-batch comes first.

    `token_budget` counts the complete micro-batch, over all of its context-parallel ranks and padded to a
    multiple of `pack_multiple`. Raises ValueError for a sequence that does not fit the budget.
    """
    token_budget -= token_budget % pack_multiple
    if min(data_parallel_size, token_budget, length_multiple, count_multiple) < 1:
        raise ValueError(
            f"data_parallel_size ({data_parallel_size}), token_budget ({token_budget}), "
            f"length_multiple ({length_multiple}) and count_multiple ({count_multiple}) must be positive"
        )
    tokens = padded_lengths(lengths, length_multiple)
    if (tokens > token_budget).any():
        index = int(tokens.argmax())
        raise ValueError(
            f"sequence {index} has {lengths[index]} tokens, {tokens[index]} after padding to a multiple of "
            f"{length_multiple}, but a micro-batch has space for {token_budget}; raise "
            "batch.max_tokens_per_micro_batch or shorten the responses"
        )
    costs = sequence_cost(tokens, attention_crossover)
    order = np.argsort(-tokens, kind="stable")
    groups = max(1, -(-int(tokens.sum()) // (token_budget * data_parallel_size * count_multiple)))
    while (
        bins := _fill(order, tokens, costs, groups * count_multiple * data_parallel_size, token_budget)
    ) is None:
        groups += 1
    return _spread(bins, costs, data_parallel_size)


def _fill(
    order: np.ndarray, tokens: np.ndarray, costs: np.ndarray, count: int, budget: int
) -> list[MicroBatch] | None:
    """The sequences of `count` micro-batches: balanced if that fits, else best-fit decreasing, else None."""
    for balanced in (True, False):
        bins: list[MicroBatch] = [[] for _ in range(count)]
        used, load = np.zeros(count, dtype=np.int64), np.zeros(count)
        for index in order:
            fits = used + tokens[index] <= budget
            if not fits.any():
                break
            best = int(np.where(fits, load if balanced else budget - used, np.inf).argmin())
            bins[best].append(int(index))
            used[best] += tokens[index]
            load[best] += costs[index]
        else:
            return _occupy_empty(bins)
    return None


def _occupy_empty(bins: list[MicroBatch]) -> list[MicroBatch]:
    """Move a sequence into every empty micro-batch: the shortest of the fullest one, if that has two."""
    for target in bins:
        if not target:
            donor = max(bins, key=len)
            if len(donor) > 1:
                target.append(donor.pop())
    return bins


def _spread(bins: list[MicroBatch], costs: np.ndarray, ranks: int) -> Packing:
    """Assign micro-batches to ranks, costliest first, each to the cheapest rank that is not full yet."""
    per_rank = len(bins) // ranks
    totals = [float(costs[members].sum()) if members else 0.0 for members in bins]
    packing: Packing = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for index in sorted(range(len(bins)), key=lambda i: (-totals[i], i)):
        rank = min((r for r in range(ranks) if len(packing[r]) < per_rank), key=lambda r: (load[r], r))
        packing[rank].append(sorted(bins[index]))
        load[rank] += totals[index]
    return packing
