"""One context-parallel rank's part of one micro-batch, made on the host when a micro-batch is packed.

Sequences lie end to end (THD), each padded to `length_multiple`, the last one on to `pack_multiple`. With context parallelism
each is cut into 2·cp equal chunks and rank r holds chunks r and 2·cp−1−r of every sequence (Megatron's zigzag, which evens out
causal attention). Labels, masks and advantages are shifted to the position that predicts them before that cut, so no rank needs
its neighbour's tokens.

Letters: T packed tokens on this rank, R response rows on this rank, S sequences in the micro-batch, cp ranks.
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
    """What one rank computes on. A row is a local token whose next token the policy chose (response mask 1)."""

    input_ids: Tensor
    """int64 [1, T]."""
    position_ids: Tensor
    """int64 [1, T]: position in the token's own sequence."""
    cu_seqlens_padded: Tensor
    """int32 [S + 1]: where sequences start, padding included, over all context-parallel ranks."""
    max_seqlen: int
    """Longest sequence, padding included, over all context-parallel ranks."""
    row_index: Tensor
    """int64 [R]: local token of each row, rising."""
    labels: Tensor
    """int64 [R]: the token that follows it."""
    rows: PolicyRows
    """What the loss needs, the rollout engine's log-probs included. `old_log_probs` are zeros until `with_old_log_probs`."""
    row_sequence: np.ndarray
    """int64 [R], host: sequence of each row."""
    row_position: np.ndarray
    """int64 [R], host: position of each row's token in its sequence; its label is at the next."""
    prompt_lengths: np.ndarray
    """int64 [S], host. 0 for the padding sequence of an empty micro-batch."""
    response_lengths: np.ndarray
    """int64 [S], host: response tokens, tool tokens included."""

    @property
    def num_rows(self) -> int:
        return len(self.row_sequence)

    def to(self, device: torch.device | str) -> "PackedShard":
        """The same shard with its tensors on `device`; host arrays stay."""
        moved: dict[str, Any] = {
            k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor | PolicyRows)
        }
        return replace(self, **moved)

    def with_old_log_probs(self, old_log_probs: Tensor) -> "PackedShard":
        """The same shard whose rows have these old log-probs, float32 [R] on the shard's device."""
        if old_log_probs.shape != self.labels.shape:
            raise ValueError(
                f"old_log_probs has shape {list(old_log_probs.shape)}, but the shard has {self.num_rows} rows"
            )
        return replace(self, rows=replace(self.rows, old_log_probs=old_log_probs))

    def with_reference_log_probs(self, reference_log_probs: Tensor) -> "PackedShard":
        """The same shard whose rows have these log-probs of the reference model, float32 [R] on the shard's device."""
        if reference_log_probs.shape != self.labels.shape:
            raise ValueError(
                f"reference_log_probs has shape {list(reference_log_probs.shape)}, but there are {self.num_rows} rows"
            )
        return replace(self, rows=replace(self.rows, reference_log_probs=reference_log_probs))

    def scatter_rows(self, values: Tensor | np.ndarray) -> list[np.ndarray]:
        """Puts one number per row [R] back where it belongs: per trajectory an array [response length] in the dtype of values.

        NaN where this rank holds no row: tool tokens, and what lies on other context-parallel ranks. An empty micro-batch gives
        an empty list.
        """
        host = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
        if host.shape != (self.num_rows,):
            raise ValueError(f"values have shape {list(host.shape)}, but the shard has {self.num_rows} rows")
        starts = np.cumsum(self.response_lengths) - self.response_lengths
        flat = np.full(int(self.response_lengths.sum()), np.nan, dtype=host.dtype)
        flat[starts[self.row_sequence] + self.row_position + 1 - self.prompt_lengths[self.row_sequence]] = (
            host
        )
        trajectories = np.count_nonzero(
            self.prompt_lengths
        )  # a prompt is never empty, so this leaves out the padding sequence
        return np.split(flat, starts[1:])[:trajectories]


def zigzag_table(padded: np.ndarray, context_parallel_size: int) -> ChunkTable:
    """Which positions every rank holds of sequences with these padded lengths [S] (multiples of 2·cp if cp > 1).

    Without context parallelism a sequence is one chunk.
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
    """The part of a micro-batch that `context_parallel_rank` computes, on the CPU.

    All ranks must be given the same trajectories in the same order. Over all ranks the micro-batch holds a multiple of
    `pack_multiple` tokens, which is 1 or a multiple of `length_multiple`. Without trajectories the shard is one padding sequence
    without rows, so that a rank with an empty micro-batch can run it like the others.
    Raises ValueError, naming the trajectory, for lengths that disagree, an empty prompt, more than `max_position` tokens, or
    an advantage that is not finite.
    """
    if context_parallel_size > 1 and length_multiple % (2 * context_parallel_size):
        raise ValueError(
            f"length_multiple is {length_multiple}; with context_parallel_size {context_parallel_size} it must be "
            f"a multiple of {2 * context_parallel_size}"
        )
    if pack_multiple > 1 and pack_multiple % length_multiple:
        raise ValueError(
            f"pack_multiple is {pack_multiple}, which is no multiple of length_multiple {length_multiple}"
        )
    for index, trajectory in enumerate(trajectories):
        _check(index, trajectory, max_position)
    whole = _lay_out(trajectories, length_multiple, pack_multiple, pad_token_id)
    table = zigzag_table(whole.padded, context_parallel_size)

    local = _held_tokens(
        whole.starts, table.first[context_parallel_rank].numpy(), table.length[context_parallel_rank].numpy()
    )
    sequence = whole.sequence[local]
    position = local - whole.starts[sequence]
    row_index = np.flatnonzero(whole.is_row[local])
    row_token, row_sequence, row_position = local[row_index], sequence[row_index], position[row_index]

    row_count, last_row = _rows_per_sequence(whole)
    rows = PolicyRows(
        old_log_probs=torch.zeros(len(row_index)),
        advantages=torch.from_numpy(whole.advantages[row_sequence]),
        last_row=torch.from_numpy((row_token == last_row[row_sequence]).astype(np.float32)),
        response_length=torch.from_numpy(row_count.astype(np.float32)),
        plan=build_scan_plan(table, context_parallel_rank, row_sequence, row_position),
        rollout_log_probs=torch.from_numpy(whole.rollout_log_probs[row_token]),
    )
    return PackedShard(
        input_ids=torch.from_numpy(whole.ids[local])[None],
        position_ids=torch.from_numpy(position)[None],
        cu_seqlens_padded=torch.from_numpy(np.append(whole.starts, len(whole.ids)).astype(np.int32)),
        max_seqlen=int(whole.padded.max()),
        row_index=torch.from_numpy(row_index),
        labels=torch.from_numpy(whole.ids[row_token + 1]),
        rows=rows,
        row_sequence=row_sequence,
        row_position=row_position,
        prompt_lengths=whole.prompt_lengths,
        response_lengths=whole.response_lengths,
    )


@dataclass(frozen=True)
class _Layout:
    """The whole micro-batch, before the context split: sequences end to end, N tokens with padding."""

    ids: np.ndarray
    """int64 [N]."""
    sequence: np.ndarray
    """int64 [N]: sequence of each token."""
    is_row: np.ndarray
    """bool [N]: the next token is one that the policy chose."""
    rollout_log_probs: np.ndarray
    """float32 [N]: of the next token."""
    starts: np.ndarray
    """int64 [S]."""
    padded: np.ndarray
    """int64 [S]."""
    prompt_lengths: np.ndarray
    response_lengths: np.ndarray
    advantages: np.ndarray
    """float32 [S]."""


def _lay_out(
    trajectories: Sequence[Trajectory], length_multiple: int, pack_multiple: int, pad_token_id: int
) -> _Layout:
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
        is_row[predicting] = np.asarray(trajectory.response_mask, dtype=bool)
        log_probs[predicting] = trajectory.rollout_log_probs
    return _Layout(
        ids=ids,
        sequence=np.repeat(np.arange(len(padded)), padded),
        is_row=is_row,
        rollout_log_probs=log_probs,
        starts=starts,
        padded=padded,
        prompt_lengths=prompts,
        response_lengths=responses,
        advantages=np.array([t.advantage for t in trajectories] or [0.0], dtype=np.float32),
    )


def _held_tokens(starts: np.ndarray, first: np.ndarray, length: np.ndarray) -> np.ndarray:
    """int64 [T]: places in the whole micro-batch of the tokens in the chunks [S, C], sequence by sequence."""
    begin, count = (starts[:, None] + first).ravel(), length.ravel()
    return np.repeat(begin - (np.cumsum(count) - count), count) + np.arange(count.sum())


def _rows_per_sequence(whole: _Layout) -> tuple[np.ndarray, np.ndarray]:
    """Rows of each sequence over all ranks [S], and the place of its last one [S] (-1 where it has none)."""
    tokens = np.flatnonzero(whole.is_row)
    count = np.bincount(whole.sequence[tokens], minlength=len(whole.starts))
    last = np.full(len(whole.starts), -1, dtype=np.int64)
    last[whole.sequence[tokens]] = tokens  # rising, so the last one stays
    return count, last


def _check(index: int, trajectory: Trajectory, max_position: int) -> None:
    name = f"trajectory {index} of group {trajectory.group_id}"
    if not trajectory.prompt_ids:
        raise ValueError(f"{name} has an empty prompt, so nothing predicts its first response token")
    for field in ("response_mask", "rollout_log_probs"):
        if len(getattr(trajectory, field)) != trajectory.response_length:
            length = len(getattr(trajectory, field))
            raise ValueError(
                f"{name} has {trajectory.response_length} response tokens but {length} values in {field}"
            )
    if trajectory.length > max_position:
        raise ValueError(
            f"{name} has {trajectory.length} tokens, but the model has {max_position} positions; lower the length limits"
        )
    if not math.isfinite(trajectory.advantage):
        raise ValueError(
            f"{name} has the advantage {trajectory.advantage}; a reward of its group is not finite"
        )
