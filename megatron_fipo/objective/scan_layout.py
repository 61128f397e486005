"""The chunk table of a micro-batch, the index tables of the FutureKL scan, and its one collective.

The tables are made on the host, once, when a micro-batch is packed. `future_kl.py` has a worked example.

Notation: R rows (response tokens on this rank), S sequences in the micro-batch, C chunks per sequence and rank (2 in
Megatron's zigzag), cp context-parallel ranks.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BLOCK = 128
"""Positions in a block of the scan, and blocks in a block of blocks."""
LARGEST_RATE = 2000.0
"""2^−2000 is 0 in float64, so a half life below 1/2000 is γ = 0 exactly; the bound keeps 0·rate from becoming 0·∞."""
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
"""The name in `torch.distributed` of the gather into one tensor: the second is deprecated from torch 2.13 on."""


@dataclass(frozen=True)
class ChunkTable:
    """Which positions of which sequence each context-parallel rank holds. Host tensors or anything `torch.as_tensor` takes.

    Chunk c of sequence s on rank r is the `length[r, s, c]` positions from `first[r, s, c]` on; length 0 means no chunk.
    Every layout that gives each position to exactly one rank is valid: zigzag, contiguous, uneven.
    """

    first: Tensor
    """int64 [cp, S, C]."""
    length: Tensor
    """int64 [cp, S, C]."""

    def __post_init__(self) -> None:
        for name in ("first", "length"):
            table = _host_integers(getattr(self, name), f"chunk table: {name}")
            if table.ndim != 3:
                raise ValueError(f"chunk table: {name} must be integers [cp, S, C], not {list(table.shape)}")
            object.__setattr__(self, name, table)
        if self.first.shape != self.length.shape:
            raise ValueError(
                f"chunk table: first is {list(self.first.shape)} but length is {list(self.length.shape)}"
            )

    @property
    def context_parallel_size(self) -> int:
        return self.first.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.first.shape[1]

    @property
    def chunks_per_rank(self) -> int:
        return self.first.shape[2]

    def validate(self) -> None:
        """Raise ValueError, naming sequence and positions, unless each sequence is covered from 0 on exactly once."""
        for name, table in (("first position", self.first), ("length", self.length)):
            if (table < 0).any():
                rank, sequence, chunk = map(int, (table < 0).nonzero()[0])
                raise ValueError(
                    f"chunk table: {name} of chunk {chunk} of sequence {sequence} on rank {rank} is "
                    f"{int(table[rank, sequence, chunk])}"
                )
        first, length = (table.transpose(0, 1).flatten(1) for table in (self.first, self.length))  # [S, cp·C]
        order = torch.where(length > 0, first, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
        first, length = first.gather(1, order), length.gather(1, order)
        expected = length.cumsum(1) - length
        wrong = (length > 0) & (first != expected)
        if wrong.any():
            sequence, chunk = map(int, wrong.nonzero()[0])
            found, due = int(first[sequence, chunk]), int(expected[sequence, chunk])
            fault = "are held by no rank" if due < found else "are held twice"
            start, end = sorted((found, due))
            raise ValueError(f"chunk table: positions {start} to {end - 1} of sequence {sequence} {fault}")


@dataclass(frozen=True)
class Level:
    """One level of blocks. A segment has blocks of its own; zeros pad its end, so its first slot holds its exact aggregate."""

    slot: Tensor
    """int64 [elements]: index of each element in the flattened [blocks, 128] grid."""
    blocks: int


@dataclass(frozen=True)
class ScanPlan:
    """Index tables for one rank's part of one micro-batch. Segment s·C + c is chunk c of sequence s on this rank.

    All tensors are contiguous, whatever the layout of the chunk table: kernels rely on it.
    """

    row_sequence: Tensor
    """int64 [R]: sequence of each row."""
    row_segment: Tensor
    """int64 [R]: segment of each row."""
    row_distance: Tensor
    """float64 [R]: positions from each row to the end of its chunk, at least 1."""
    first_row_offset: Tensor
    """float64 [S, C]: positions from the start of each chunk to its first row."""
    chunk_distance: Tensor
    """float64 [cp, S, C, C]: from the end of this rank's chunk (last axis) to the start of every chunk of every rank."""
    is_later: Tensor
    """float64 [cp, S, C, C]: 1 if that chunk is after this rank's chunk in the sequence, else 0."""
    levels: tuple[Level, ...]
    """Blocks of rows, then blocks of blocks, until every segment is one block."""
    slot_row: Tensor
    """int32 [blocks · 128]: the row in each slot of the first level, −1 if none; the inverse of `levels[0].slot`."""
    first_block: Tensor
    """int32 [S·C + 1]: index of each segment's first first-level block; each segment has at least one block."""
    block_segment: Tensor
    """int32 [blocks]: segment of each first-level block."""

    @property
    def num_rows(self) -> int:
        return self.row_sequence.shape[0]

    @property
    def num_blocks(self) -> int:
        return self.block_segment.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.first_row_offset.shape[0]

    @property
    def chunks_per_rank(self) -> int:
        return self.first_row_offset.shape[1]

    @property
    def context_parallel_size(self) -> int:
        return self.chunk_distance.shape[0]

    def to(self, device: torch.device | str) -> "ScanPlan":
        """The same plan with its tables on `device`."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "levels"}
        levels = tuple(Level(level.slot.to(device), level.blocks) for level in self.levels)
        return replace(self, **moved, levels=levels)


def build_scan_plan(
    table: ChunkTable,
    rank: int,
    row_sequence: Any,
    row_position: Any,
    device: torch.device | str = "cpu",
) -> ScanPlan:
    """Index tables for `rank` (its index in the context-parallel group), whose row i is a position of a sequence.

    `row_sequence` and `row_position` are integers [R] (tensors or anything `torch.as_tensor` takes), in any order; R may
    be 0. Positions without a row (prompt, padding, tool output) count as distance and contribute nothing. Raises
    ValueError for an invalid table, a rank outside it, and rows that repeat or that this rank does not hold.
    """
    table.validate()
    if not 0 <= rank < table.context_parallel_size:
        raise ValueError(f"rank {rank} is outside a chunk table for {table.context_parallel_size} ranks")
    sequence, position = _checked_rows(table, row_sequence, row_position)
    first, length = table.first[rank], table.length[rank]
    segment = _segment_of_rows(table, rank, sequence, position)

    # Only the span between a segment's first and last row takes part in the scan.
    start, end = first.flatten(), (first + length).flatten()
    span_start = end.scatter_reduce(0, segment, position, "amin")
    span_end = start.scatter_reduce(0, segment, position + 1, "amax")
    width = (span_end - span_start).clamp(min=0)
    levels = _build_levels(segment, position - span_start[segment], width)
    _refuse_repeats(levels[0].slot, sequence, position)
    blocks = _blocks_of(width)
    slot_row = torch.full((int(blocks.sum()) * BLOCK,), -1, device="cpu")
    slot_row[levels[0].slot] = torch.arange(len(sequence), device="cpu")

    distance = table.first[:, :, :, None] - (first + length)[None, :, None, :]
    is_later = (distance >= 0) & (table.length[:, :, :, None] > 0)
    return ScanPlan(
        row_sequence=sequence,
        row_segment=segment,
        row_distance=(end[segment] - position).double(),
        first_row_offset=torch.where(width > 0, span_start - start, 0).view(first.shape).double(),
        chunk_distance=torch.where(is_later, distance, 0).double().contiguous(),
        is_later=is_later.double().contiguous(),
        levels=levels,
        slot_row=slot_row.int(),
        first_block=torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), blocks.cumsum(0)]).int(),
        block_segment=torch.arange(len(blocks), device="cpu").repeat_interleave(blocks).int(),
    ).to(device)


def decay_rate(half_life: float) -> float:
    """−log2 γ, in 1/tokens. Raises ValueError unless the half life is positive."""
    if not half_life > 0:
        raise ValueError(f"half_life must be positive, not {half_life}")
    return min(1.0 / half_life, LARGEST_RATE)


def check_group(plan: ScanPlan, group: dist.ProcessGroup | None) -> None:
    """ValueError unless the group has as many ranks as the plan was made for."""
    ranks = 1 if group is None else group.size()
    if ranks != plan.context_parallel_size:
        raise ValueError(
            f"the plan is for {plan.context_parallel_size} context-parallel ranks, but the group has {ranks}"
        )


def all_gather(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[S, ...] on every rank → [cp, S, ...]. One all-gather over `group`, or none without a group."""
    if group is None:
        return local.unsqueeze(0)
    gathered = local.new_empty(group.size() * len(local), *local.shape[1:])
    getattr(dist, ALL_GATHER)(gathered, local, group=group)
    return gathered.view(group.size(), *local.shape)


def _host_integers(value: Any, name: str) -> Tensor:
    """A contiguous int64 copy on the host of a tensor, an array or nested lists. ValueError for anything but integers."""
    try:
        value = (
            value.copy() if hasattr(value, "copy") else value
        )  # an array may be read-only or have negative strides
        tensor = torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be integers, not {type(value).__name__} ({error})") from None
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
        raise ValueError(f"{name} must be integers, not {tensor.dtype}")
    return tensor.to(torch.int64, copy=True).contiguous()


def _checked_rows(table: ChunkTable, row_sequence: Any, row_position: Any) -> tuple[Tensor, Tensor]:
    sequence = _host_integers(row_sequence, "rows: sequences")
    position = _host_integers(row_position, "rows: positions")
    if sequence.ndim != 1 or sequence.shape != position.shape:
        raise ValueError(
            f"rows: sequences {list(sequence.shape)} and positions {list(position.shape)} must both be [R]"
        )
    outside = (sequence < 0) | (sequence >= table.num_sequences)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"row {row} is of sequence {int(sequence[row])}, but the chunk table has {table.num_sequences} sequences"
        )
    return sequence, position


def _segment_of_rows(table: ChunkTable, rank: int, sequence: Tensor, position: Tensor) -> Tensor:
    """int64 [R]: sequence · C + chunk of each row. ValueError for a position that the rank does not hold."""
    first, length = table.first[rank], table.length[rank]
    inside = (position[:, None] >= first[sequence]) & (position[:, None] < (first + length)[sequence])
    missing = ~inside.any(dim=1)
    if missing.any():
        row = int(missing.nonzero()[0])
        raise ValueError(
            f"rank {rank} does not hold position {int(position[row])} of sequence {int(sequence[row])} (row {row})"
        )
    return sequence * table.chunks_per_rank + inside.int().argmax(dim=1)


def _blocks_of(width: Tensor) -> Tensor:
    """Blocks that segments of `width` elements take: at least one each."""
    return ((width + BLOCK - 1) // BLOCK).clamp(min=1)


def _build_levels(segment: Tensor, index: Tensor, width: Tensor) -> tuple[Level, ...]:
    """The levels for elements at `index` < width[segment] of their segment."""
    levels = []
    while True:
        blocks = _blocks_of(width)
        offset = blocks.cumsum(0) - blocks
        levels.append(Level(offset[segment] * BLOCK + index, int(blocks.sum())))
        if (blocks <= 1).all():
            return tuple(levels)
        segment = torch.arange(len(width), device="cpu").repeat_interleave(blocks)
        index, width = torch.arange(len(segment), device="cpu") - offset[segment], blocks


def _refuse_repeats(slot: Tensor, sequence: Tensor, position: Tensor) -> None:
    """Two rows at one position would share a slot, and one of them would be lost."""
    repeated = torch.bincount(slot)[slot] > 1
    if repeated.any():
        row = int(repeated.nonzero()[0])
        raise ValueError(
            f"position {int(position[row])} of sequence {int(sequence[row])} has more than one row"
        )
