"""Where everything lies: the chunk table of a micro-batch, and the index tables that the FutureKL scan runs on.

All of this is made on the host, once, when a micro-batch is packed. Letters: R rows (response tokens on this rank),
S sequences in the micro-batch, C chunks per sequence and rank (2 in Megatron's zigzag), cp context-parallel ranks.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

BLOCK = 128
"""Positions in a block of the scan, and blocks in a block of blocks."""


@dataclass(frozen=True)
class ChunkTable:
    """Which positions of which sequence every context-parallel rank holds.

    Chunk c of sequence s on rank r is the `length[r, s, c]` positions from `first[r, s, c]` on; length 0 means no chunk.
    Any layout that gives each position to exactly one rank will do: zigzag, contiguous, uneven. Both are int64 [cp, S, C].
    """

    first: np.ndarray
    length: np.ndarray

    def __post_init__(self) -> None:
        for name in ("first", "length"):
            table = np.asarray(getattr(self, name))
            if table.ndim != 3 or table.dtype.kind not in "iu":
                raise ValueError(
                    f"chunk table: {name} must be integers [cp, S, C], not {table.dtype} {list(table.shape)}"
                )
            object.__setattr__(self, name, table.astype(np.int64, order="C"))
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
                rank, sequence, chunk = (int(index[0]) for index in np.nonzero(table < 0))
                value = table[rank, sequence, chunk]
                raise ValueError(
                    f"chunk table: {name} of chunk {chunk} of sequence {sequence} on rank {rank} is {value}"
                )
        by_sequence = (self.num_sequences, self.context_parallel_size * self.chunks_per_rank)
        first, length = (table.transpose(1, 0, 2).reshape(by_sequence) for table in (self.first, self.length))
        order = np.argsort(np.where(length > 0, first, np.iinfo(np.int64).max), axis=1, kind="stable")
        first, length = np.take_along_axis(first, order, 1), np.take_along_axis(length, order, 1)
        due = np.cumsum(length, axis=1) - length
        wrong = (length > 0) & (first != due)
        if wrong.any():
            sequence, chunk = (int(index[0]) for index in np.nonzero(wrong))
            start, end = sorted((int(first[sequence, chunk]), int(due[sequence, chunk])))
            fault = "are held by no rank" if start == due[sequence, chunk] else "are held twice"
            raise ValueError(f"chunk table: positions {start} to {end - 1} of sequence {sequence} {fault}")


@dataclass(frozen=True)
class Level:
    """One level of blocks. A segment owns whole blocks; zeros pad its end, so its first slot holds its exact aggregate."""

    slot: Tensor
    """int64 [elements]: place of each element in the flattened [blocks, 128] grid."""
    blocks: int


@dataclass(frozen=True)
class ScanPlan:
    """Index tables for one rank's part of one micro-batch. Segment s·C + c is chunk c of sequence s on this rank.

    All are contiguous, whatever the layout of the chunk table: kernels rely on it.
    """

    row_sequence: Tensor
    """int64 [R]: sequence of each row."""
    row_segment: Tensor
    """int64 [R]: segment of each row."""
    row_distance: Tensor
    """float64 [R]: positions from each row to the end of its chunk, at least 1."""
    lead: Tensor
    """float64 [S, C]: positions from the start of each chunk to its first row."""
    distance: Tensor
    """float64 [cp, S, C, C]: from the end of this rank's chunk (last axis) to the start of every chunk of every rank."""
    follows: Tensor
    """float64 [cp, S, C, C]: 1 where that chunk lies behind this rank's chunk, else 0."""
    levels: tuple[Level, ...]
    """Blocks of rows, then blocks of blocks, until every segment is one block."""
    slot_row: Tensor
    """int32 [blocks · 128]: the row in each slot of the first level, −1 where there is none; what `levels[0].slot` is the inverse of."""
    first_block: Tensor
    """int32 [S·C + 1]: where the first-level blocks of each segment begin; each segment has at least one."""
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
        return self.lead.shape[0]

    @property
    def context_parallel_size(self) -> int:
        return self.distance.shape[0]

    def to(self, device: torch.device | str) -> "ScanPlan":
        """The same plan with its tables on `device`."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "levels"}
        return replace(
            self, **moved, levels=tuple(Level(level.slot.to(device), level.blocks) for level in self.levels)
        )


def build_scan_plan(
    table: ChunkTable,
    rank: int,
    row_sequence: np.ndarray,
    row_position: np.ndarray,
    device: torch.device | str = "cpu",
) -> ScanPlan:
    """Index tables for `rank` (its index in the context-parallel group), whose row i is a position of a sequence.

    `row_sequence` and `row_position` are integers [R], in any order; R may be 0. Positions that have no row (prompt,
    padding, tool output) count as distance and contribute nothing. Raises ValueError for a bad table, a rank outside it,
    and rows that repeat or that this rank does not hold.
    """
    table.validate()
    if not 0 <= rank < table.context_parallel_size:
        raise ValueError(f"rank {rank} is outside a chunk table for {table.context_parallel_size} ranks")
    sequence, position = _checked_rows(table, row_sequence, row_position)
    first, length = table.first[rank], table.length[rank]

    inside = (position[:, None] >= first[sequence]) & (position[:, None] < (first + length)[sequence])
    if not inside.any(axis=1).all():
        row = int(np.argmin(inside.any(axis=1)))
        raise ValueError(
            f"rank {rank} does not hold position {position[row]} of sequence {sequence[row]} (row {row})"
        )
    segment = sequence * table.chunks_per_rank + inside.argmax(axis=1)

    # Only the span between a segment's first and last row takes part in the scan.
    start, end = first.ravel(), (first + length).ravel()
    span_start, span_end = end.copy(), start.copy()
    np.minimum.at(span_start, segment, position)
    np.maximum.at(span_end, segment, position + 1)
    width = np.maximum(span_end - span_start, 0)
    levels = _build_levels(segment, position - span_start[segment], width)
    _refuse_repeats(levels[0][0], sequence, position)
    blocks = np.maximum(1, -(-width // BLOCK))
    slot_row = np.full(blocks.sum() * BLOCK, -1)
    slot_row[levels[0][0]] = np.arange(len(sequence))

    ahead = table.first[:, :, :, None] - (first + length)[None, :, None, :]
    follows = (ahead >= 0) & (table.length[:, :, :, None] > 0)
    tables = {
        "row_sequence": sequence,
        "row_segment": segment,
        "row_distance": (end[segment] - position).astype(np.float64),
        "lead": np.where(width > 0, span_start - start, 0).reshape(first.shape).astype(np.float64),
        "distance": np.where(follows, ahead, 0).astype(np.float64),
        "follows": follows.astype(np.float64),
        "slot_row": slot_row.astype(np.int32),
        "first_block": np.append(0, np.cumsum(blocks)).astype(np.int32),
        "block_segment": np.repeat(np.arange(len(blocks)), blocks).astype(np.int32),
    }
    return ScanPlan(
        **{name: torch.from_numpy(np.ascontiguousarray(value)).to(device) for name, value in tables.items()},
        levels=tuple(Level(torch.from_numpy(slot).to(device), blocks) for slot, blocks in levels),
    )


def _checked_rows(
    table: ChunkTable, row_sequence: np.ndarray, row_position: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    sequence, position = np.asarray(row_sequence, dtype=np.int64), np.asarray(row_position, dtype=np.int64)
    if sequence.ndim != 1 or sequence.shape != position.shape:
        raise ValueError(
            f"rows: sequences {list(sequence.shape)} and positions {list(position.shape)} must both be [R]"
        )
    outside = (sequence < 0) | (sequence >= table.num_sequences)
    if outside.any():
        row = int(outside.argmax())
        raise ValueError(
            f"row {row} is of sequence {sequence[row]}, but the chunk table has {table.num_sequences} sequences"
        )
    return sequence, position


def _build_levels(segment: np.ndarray, index: np.ndarray, width: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """(slot of each element, number of blocks) per level, for elements at `index` < width[segment] of their segment."""
    levels = []
    while True:
        blocks = np.maximum(1, -(-width // BLOCK))
        offset = np.cumsum(blocks) - blocks
        levels.append((offset[segment] * BLOCK + index, int(blocks.sum())))
        if (blocks <= 1).all():
            return levels
        segment = np.repeat(np.arange(len(width)), blocks)
        index, width = np.arange(len(segment)) - offset[segment], blocks


def _refuse_repeats(slot: np.ndarray, sequence: np.ndarray, position: np.ndarray) -> None:
    """Two rows at one position would share a slot, and one of them would be lost."""
    if len(slot) and np.bincount(slot).max() > 1:
        row = int(np.flatnonzero(np.bincount(slot)[slot] > 1)[0])
        raise ValueError(f"position {position[row]} of sequence {sequence[row]} has more than one row")
