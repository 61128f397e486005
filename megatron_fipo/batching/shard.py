"""One context-parallel rank's shard of one micro-batch, built on the host when a micro-batch is packed.

Sequences are concatenated (THD). Each is padded to `length_multiple`; the last one is padded further, so that
the total is a multiple of `pack_multiple`. With context parallelism each sequence is cut into 2·cp equal
chunks, and rank r holds chunks r and 2·cp−1−r of every sequence (Megatron's zigzag, which balances causal
attention). Labels, masks and advantages are shifted to the position that predicts them before this cut, so no
rank needs tokens of another rank.

Notation: T packed tokens on this rank, R response rows on this rank, S sequences in the micro-batch, cp
ranks. A row is a token whose next token was sampled from the policy (response mask 1).

Example: two sequences, context_parallel_size 2, length_multiple 4, pack_multiple 1. Sequence A has the prompt
a0 a1 and the response a2 a3 a4; sequence B has the prompt b0 and the response b1 b2 b3, where b2 is tool
output (mask 1 0 1).

    sequence  length  padded  chunk size  chunks (positions)        rows at positions -> labels
    A         5       8       2           0 1 | 2 3 | 4 5 | 6 7     1 -> a2, 2 -> a3, 3 -> a4
    B         4       4       1           0 | 1 | 2 | 3             0 -> b1, 2 -> b3

    complete micro-batch: 12 tokens, cu_seqlens_padded 0 8 12, max_seqlen 8 (the same on both ranks)

    rank 0: chunks 0 and 3         local token    0   1   2   3   4   5
            T = 6, R = 2           sequence       A   A   A   A   B   B
                                   position_ids   0   1   6   7   0   3
                                   input_ids     a0  a1 pad pad  b0  b3
                                   labels            a2          b1        row_index 1 4, last_row 0 0

    rank 1: chunks 1 and 2         local token    0   1   2   3   4   5
            T = 6, R = 3           sequence       A   A   A   A   B   B
                                   position_ids   2   3   4   5   1   2
                                   input_ids     a2  a3  a4 pad  b1  b2
                                   labels        a3  a4              b3    row_index 0 1 5, last_row 0 1 1

The label a2 of the row on rank 0 is a token of rank 1: hence the shift before the cut. response_length is 3 2
on both ranks. With pack_multiple 8, B would be padded to 8 tokens, and each rank would hold 8 tokens.

Invariants of the shards of one micro-batch:

1. Every token of every padded sequence is on exactly one rank. Every row is on exactly one rank.
2. T, `cu_seqlens_padded`, `max_seqlen` and `rows.response_length` are the same on all ranks; T > 0. R differs
   and may be 0.
3. Every padded length is a multiple of `length_multiple`, and their sum of `pack_multiple`. Only the last
   sequence's padding depends on `pack_multiple`.
4. `row_index` rises strictly. A row's label is the token at the next position of the same sequence, on any
   rank.
5. No padding token is a row or a label. Over all ranks, a sequence with rows has exactly one row with
   `last_row` 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_fipo.batching.packing import padded_lengths
from megatron_fipo.batching.trajectory import Trajectory
from megatron_fipo.objective.loss_inputs import PolicyRows
from megatron_fipo.objective.scan_layout import ChunkTable, build_scan_plan


@dataclass(frozen=True)
class PackedShard:
    """The input of one rank for one micro-batch."""

    input_ids: Tensor
    """int64 [1, T]."""
    position_ids: Tensor
    """int64 [1, T]: position of each token in its sequence."""
    cu_seqlens_padded: Tensor
    """int32 [S + 1]: start of each sequence, padding included, over all context-parallel ranks."""
    max_seqlen: int
    """Length of the longest sequence, padding included, over all context-parallel ranks."""
    row_index: Tensor
    """int64 [R]: index of each row's token among the local tokens, rising."""
    labels: Tensor
    """int64 [R]: the next token of the sequence."""
    rows: PolicyRows
    """Per-row input of the loss, including the rollout engine's log-probs. `old_log_probs` is 0 until
    `with_old_log_probs`."""
    routes: Tensor | None
    """int16 [T, layers, k]: the rollout engine's experts of each token, -1 where they are not known; None without any."""
    row_sequence: np.ndarray
    """int64 [R], host: sequence of each row."""
    row_position: np.ndarray
    """int64 [R], host: position of each row's token in its sequence; the label is at the next position."""
    prompt_lengths: np.ndarray
    """int64 [S], host. 0 for the padding sequence of an empty micro-batch."""
    response_lengths: np.ndarray
    """int64 [S], host: response tokens, tool tokens included."""

    @property
    def num_rows(self) -> int:
        return len(self.row_sequence)

    def to(self, device: torch.device | str) -> "PackedShard":
        """The same shard with its tensors on `device`; host arrays are shared."""
        moved: dict[str, Any] = {
            k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor | PolicyRows)
        }
        return replace(self, **moved)

    def with_old_log_probs(self, old_log_probs: Tensor) -> "PackedShard":
        """The same shard with these old log-probs, float32 [R] on the shard's device."""
        if old_log_probs.shape != self.labels.shape:
            raise ValueError(
                f"old_log_probs has shape {list(old_log_probs.shape)}, but the shard has {self.num_rows} rows"
            )
        return replace(self, rows=replace(self.rows, old_log_probs=old_log_probs))

    def with_reference_log_probs(self, reference_log_probs: Tensor) -> "PackedShard":
        """The same shard with these log-probs of the reference model, float32 [R] on the shard's device."""
        if reference_log_probs.shape != self.labels.shape:
            raise ValueError(
                f"reference_log_probs has shape {list(reference_log_probs.shape)}, but the shard has "
                f"{self.num_rows} rows"
            )
        return replace(self, rows=replace(self.rows, reference_log_probs=reference_log_probs))

    def scatter_rows(self, values: Tensor | np.ndarray) -> list[np.ndarray]:
        """One number per row [R] as one array [response length] per trajectory, in the dtype of `values`.

        NaN where this rank has no row: tool tokens and tokens of other context-parallel ranks. An empty
        micro-batch gives an empty list.
        """
        host = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
        if host.shape != (self.num_rows,):
            raise ValueError(f"values have shape {list(host.shape)}, but the shard has {self.num_rows} rows")
        starts = np.cumsum(self.response_lengths) - self.response_lengths
        flat = np.full(int(self.response_lengths.sum()), np.nan, dtype=host.dtype)
        response_position = self.row_position + 1 - self.prompt_lengths[self.row_sequence]
        flat[starts[self.row_sequence] + response_position] = host
        # A prompt is never empty, so this excludes the padding sequence.
        trajectories = np.count_nonzero(self.prompt_lengths)
        return np.split(flat, starts[1:])[:trajectories]


def zigzag_table(padded: np.ndarray, context_parallel_size: int) -> ChunkTable:
    """The chunks of every rank for sequences of these padded lengths [S] (multiples of 2·cp if cp > 1).

    Chunks per rank C: 2 (r and 2·cp−1−r on rank r), or 1, the complete sequence, without context parallelism.
    """
    if context_parallel_size == 1:
        first, length = np.zeros_like(padded)[None, :, None], padded[None, :, None]
        return ChunkTable(torch.from_numpy(first), torch.from_numpy(length))
    size = padded // (2 * context_parallel_size)  # [S]
    ranks = np.arange(context_parallel_size)
    chunk = np.stack([ranks, 2 * context_parallel_size - 1 - ranks], axis=1)  # [cp, 2]
    first = chunk[:, None, :] * size[None, :, None]
    length = np.broadcast_to(size[None, :, None], first.shape).copy()
    return ChunkTable(torch.from_numpy(first), torch.from_numpy(length))


def build_shard(
    trajectories: Sequence[Trajectory],
    *,
    context_parallel_size: int,
    context_parallel_rank: int,
    length_multiple: int,
    pad_token_id: int,
    max_position: int,
    pack_multiple: int = 1,
) -> PackedShard:
    """The shard of a micro-batch for `context_parallel_rank`, on the CPU.

    All ranks must pass the same trajectories in the same order. Over all ranks the micro-batch has a multiple
    of `pack_multiple` tokens, which is 1 or a multiple of `length_multiple`. Without trajectories the shard
    is one padding sequence without rows, so that a rank with an empty micro-batch can run it like the others.
    Raises ValueError, naming the trajectory, for inconsistent lengths, an empty prompt, more than
    `max_position` tokens, or an advantage that is not finite.
    """
    if context_parallel_size > 1 and length_multiple % (2 * context_parallel_size):
        raise ValueError(
            f"length_multiple is {length_multiple}; with context_parallel_size {context_parallel_size} it "
            f"must be a multiple of {2 * context_parallel_size}"
        )
    if pack_multiple > 1 and pack_multiple % length_multiple:
        raise ValueError(
            f"pack_multiple is {pack_multiple}, which is not a multiple of length_multiple {length_multiple}"
        )
    for index, trajectory in enumerate(trajectories):
        _check(index, trajectory, max_position)
    packed = _pack(trajectories, length_multiple, pack_multiple, pad_token_id)
    table = zigzag_table(packed.padded, context_parallel_size)

    local = _chunk_tokens(
        packed.starts,
        table.first[context_parallel_rank].numpy(),
        table.length[context_parallel_rank].numpy(),
    )
    sequence = packed.sequence[local]
    position = local - packed.starts[sequence]
    row_index = np.flatnonzero(packed.is_row[local])
    row_token, row_sequence, row_position = local[row_index], sequence[row_index], position[row_index]

    row_count, last_row = _rows_per_sequence(packed)
    rows = PolicyRows(
        old_log_probs=torch.zeros(len(row_index)),
        advantages=torch.from_numpy(packed.advantages[row_sequence]),
        last_row=torch.from_numpy((row_token == last_row[row_sequence]).astype(np.float32)),
        response_length=torch.from_numpy(row_count.astype(np.float32)),
        plan=build_scan_plan(table, context_parallel_rank, row_sequence, row_position),
        rollout_log_probs=torch.from_numpy(packed.rollout_log_probs[row_token]),
    )
    return PackedShard(
        input_ids=torch.from_numpy(packed.ids[local])[None],
        position_ids=torch.from_numpy(position)[None],
        cu_seqlens_padded=torch.from_numpy(np.append(packed.starts, len(packed.ids)).astype(np.int32)),
        max_seqlen=int(packed.padded.max()),
        row_index=torch.from_numpy(row_index),
        labels=torch.from_numpy(packed.ids[row_token + 1]),
        rows=rows,
        routes=None if packed.routes is None else torch.from_numpy(packed.routes[local]),
        row_sequence=row_sequence,
        row_position=row_position,
        prompt_lengths=packed.prompt_lengths,
        response_lengths=packed.response_lengths,
    )


@dataclass(frozen=True)
class _PackedBatch:
    """The micro-batch before the context-parallel cut: concatenated sequences, N tokens with padding."""

    ids: np.ndarray
    """int64 [N]."""
    sequence: np.ndarray
    """int64 [N]: sequence of each token."""
    is_row: np.ndarray
    """bool [N]: the next token was sampled from the policy."""
    rollout_log_probs: np.ndarray
    """float32 [N]: log-prob of the next token under the rollout engine, 0 where there is none."""
    starts: np.ndarray
    """int64 [S]: index of each sequence's first token."""
    padded: np.ndarray
    """int64 [S]: padded lengths."""
    prompt_lengths: np.ndarray
    """int64 [S]."""
    response_lengths: np.ndarray
    """int64 [S]."""
    advantages: np.ndarray
    """float32 [S]."""
    routes: np.ndarray | None
    """int16 [N, layers, k], -1 where they are not known; None without any."""


def _pack(
    trajectories: Sequence[Trajectory], length_multiple: int, pack_multiple: int, pad_token_id: int
) -> _PackedBatch:
    prompts = np.array([len(t.prompt_ids) for t in trajectories] or [0], dtype=np.int64)
    responses = np.array([t.response_length for t in trajectories] or [0], dtype=np.int64)
    padded = np.maximum(padded_lengths(prompts + responses, length_multiple), length_multiple)
    padded[-1] += -padded.sum() % pack_multiple
    starts = np.cumsum(padded) - padded
    total = int(padded.sum())
    ids = np.full(total, pad_token_id, dtype=np.int64)
    is_row, log_probs = np.zeros(total, dtype=bool), np.zeros(total, dtype=np.float32)
    for start, prompt, trajectory in zip(starts, prompts, trajectories, strict=False):
        response = start + prompt
        ids[start:response] = trajectory.prompt_ids
        predicting = slice(response - 1, response - 1 + trajectory.response_length)
        ids[response : response + trajectory.response_length] = trajectory.response_ids
        is_row[predicting] = trajectory.response_mask
        log_probs[predicting] = trajectory.rollout_log_probs
    return _PackedBatch(
        ids=ids,
        sequence=np.repeat(np.arange(len(padded)), padded),
        is_row=is_row,
        rollout_log_probs=log_probs,
        starts=starts,
        padded=padded,
        prompt_lengths=prompts,
        response_lengths=responses,
        advantages=np.array([t.advantage for t in trajectories] or [0.0], dtype=np.float32),
        routes=_pack_routes(trajectories, starts, total),
    )


def _pack_routes(trajectories: Sequence[Trajectory], starts: np.ndarray, total: int) -> np.ndarray | None:
    known = [t.routes for t in trajectories if t.routes is not None]
    if not known:
        return None
    routes = np.full((total, *known[0].shape[1:]), -1, dtype=np.int16)
    for start, trajectory in zip(starts, trajectories, strict=False):
        if trajectory.routes is not None:
            if trajectory.routes.shape[1:] != routes.shape[1:]:
                raise ValueError(
                    f"routes of group {trajectory.group_id} have {list(trajectory.routes.shape[1:])} layers and experts per "
                    f"token, others {list(routes.shape[1:])}"
                )
            routes[start : start + len(trajectory.routes)] = trajectory.routes
    return routes


def _chunk_tokens(starts: np.ndarray, first: np.ndarray, length: np.ndarray) -> np.ndarray:
    """int64 [T]: indices in the packed micro-batch of the tokens of the chunks [S, C], sequence by sequence.

    Rank 0 of the example in the module docstring: starts 0 8, first [[0, 6], [0, 3]], length [[2, 2], [1, 1]]
    gives 0 1 6 7 8 11.
    """
    begin, count = (starts[:, None] + first).ravel(), length.ravel()
    return np.repeat(begin - (np.cumsum(count) - count), count) + np.arange(count.sum())


def _rows_per_sequence(packed: _PackedBatch) -> tuple[np.ndarray, np.ndarray]:
    """Rows of each sequence over all ranks [S], and the token of its last row [S] (-1 without rows)."""
    tokens = np.flatnonzero(packed.is_row)
    count = np.bincount(packed.sequence[tokens], minlength=len(packed.starts))
    last = np.full(len(packed.starts), -1, dtype=np.int64)
    last[packed.sequence[tokens]] = tokens  # tokens rise, so the last assignment remains
    return count, last


def _check(index: int, trajectory: Trajectory, max_position: int) -> None:
    name = f"trajectory {index} of group {trajectory.group_id}"
    if not len(trajectory.prompt_ids):
        raise ValueError(f"{name} has an empty prompt, so nothing predicts its first response token")
    for field in ("response_mask", "rollout_log_probs"):
        if len(getattr(trajectory, field)) != trajectory.response_length:
            length = len(getattr(trajectory, field))
            raise ValueError(
                f"{name} has {trajectory.response_length} response tokens but {length} values in {field}"
            )
    if trajectory.length > max_position:
        raise ValueError(
            f"{name} has {trajectory.length} tokens, but the model has {max_position} positions; "
            "lower the length limits"
        )
    if trajectory.routes is not None and len(trajectory.routes) > trajectory.length:
        raise ValueError(f"{name} has {trajectory.length} tokens but routes of {len(trajectory.routes)}")
    if not math.isfinite(trajectory.advantage):
        raise ValueError(
            f"{name} has the advantage {trajectory.advantage}; a reward of its group is not finite"
        )
