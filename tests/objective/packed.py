"""Cut responses into packed, context-parallel rows the way a packer would, for tests of the objective alone."""

import importlib
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_fipo.objective.future_kl import scan_future_kl
from megatron_fipo.objective.loss_inputs import PolicyRows
from megatron_fipo.objective.scan_layout import ChunkTable, build_scan_plan
from tests.objective.oracle import Response


def zigzag(lengths: Sequence[int], cp: int) -> ChunkTable:
    """Sequences padded to a multiple of 2·cp; rank r holds chunks r and 2·cp−1−r."""
    size = -(-np.asarray(lengths) // (2 * cp))
    ranks = np.arange(cp)
    chunk = np.stack([ranks, 2 * cp - 1 - ranks], axis=1)  # [cp, 2]
    first = chunk[:, None, :] * size[None, :, None]
    return ChunkTable(first, np.broadcast_to(size[None, :, None], first.shape).copy())


def contiguous(lengths: Sequence[int], cp: int) -> ChunkTable:
    """Rank r holds the r-th part; the last rank the remainder, and nothing where a sequence is short."""
    size = -(-np.asarray(lengths) // cp)
    first = np.minimum(np.arange(cp)[:, None, None] * size[None, :, None], np.asarray(lengths)[None, :, None])
    return ChunkTable(first, np.minimum(np.asarray(lengths)[None, :, None] - first, size[None, :, None]))


def scattered(lengths: Sequence[int], cp: int, chunks: int, seed: int) -> ChunkTable:
    """Random cuts, dealt to random ranks, empty chunks among them."""
    random = np.random.default_rng(seed)
    first, length = np.zeros((2, cp, len(lengths), chunks), dtype=np.int64)
    for sequence, total in enumerate(lengths):
        cuts = np.sort(random.integers(0, total + 1, cp * chunks - 1))
        starts = np.concatenate([[0], cuts])
        position = random.permutation(cp * chunks)
        first[:, sequence].flat[position] = starts
        length[:, sequence].flat[position] = np.diff(np.append(starts, total))
    return ChunkTable(first, length)


def local_rows(table: ChunkTable, rank: int, masks: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Sequence and position of the rows that `rank` holds, in packed order; `masks` say which positions are rows."""
    sequences, positions = [], []
    for sequence, mask in enumerate(masks):
        for first, length in zip(
            table.first[rank, sequence].tolist(), table.length[rank, sequence].tolist(), strict=True
        ):
            rows = first + np.flatnonzero(mask[first : first + length])
            sequences += [sequence] * len(rows)
            positions += rows.tolist()
    return np.array(sequences, dtype=np.int64), np.array(positions, dtype=np.int64)


def packed_rows(
    responses: Sequence[Response], prompts: Sequence[int], table: ChunkTable, rank: int
) -> tuple[PolicyRows, list[tuple[int, int]]]:
    """The rows of `rank`, float64, and where each comes from: (response, token). Response i starts after prompts[i] positions."""
    masks = [
        np.concatenate([np.zeros(p, bool), r.mask.numpy() != 0])
        for r, p in zip(responses, prompts, strict=True)
    ]
    sequence, position = local_rows(table, rank, masks)
    token = position - np.asarray(prompts)[sequence]
    last = np.array([max(r.tokens, default=-1) for r in responses])

    def rows(field: str) -> Tensor:
        values = [getattr(r, field).detach().numpy() for r in responses]
        starts = np.cumsum([0] + [len(v) for v in values[:-1]])
        return torch.from_numpy(np.concatenate(values)[starts[sequence] + token].astype(np.float64))

    def if_given(field: str) -> Tensor | None:
        return None if getattr(responses[0], field) is None else rows(field)

    return (
        PolicyRows(
            old_log_probs=rows("old_log_probs"),
            advantages=rows("advantages"),
            last_row=torch.from_numpy((token == last[sequence]).astype(np.float64)),
            response_length=torch.tensor([float(len(r.tokens)) for r in responses], dtype=torch.float64),
            plan=build_scan_plan(table, rank, sequence, position),
            reference_log_probs=if_given("reference_log_probs"),
            rollout_log_probs=if_given("rollout_log_probs"),
        ),
        list(zip(sequence.tolist(), token.tolist(), strict=True)),
    )


def random_responses(
    seed: int, lengths: Sequence[int], *, drift: float = 0.3, outliers: float = 0.02
) -> list[Response]:
    """Responses with holes in the mask, log-ratios of scale `drift`, and a share of outliers beyond the dual clip.

    The rollout engine differs from the old policy by a standard normal number, so a quarter of its weights are above 2.
    """
    random, engine = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    responses = []
    for length in lengths:
        old = -torch.rand(length, generator=random, dtype=torch.float64) * 4 - 0.1
        delta = torch.randn(length, generator=random, dtype=torch.float64) * drift
        delta += 3.0 * (torch.rand(length, generator=random) < outliers)
        mask = (torch.rand(length, generator=random) > 0.15).long()
        advantage = torch.randn((), generator=random, dtype=torch.float64)
        responses.append(
            Response(
                log_probs=(old + delta).requires_grad_(),
                old_log_probs=old,
                advantages=advantage.expand(length),
                mask=mask,
                reference_log_probs=old + torch.randn(length, generator=random, dtype=torch.float64) * 0.2,
                entropy=torch.rand(length, generator=random, dtype=torch.float64).requires_grad_(),
                rollout_log_probs=old - torch.randn(length, generator=engine, dtype=torch.float64),
            )
        )
    return responses


def scan_ranks(
    table: ChunkTable,
    values: list[np.ndarray],
    masks: list[np.ndarray],
    half_life: float,
    kernels: str = "torch",
) -> list[np.ndarray]:
    """F of every sequence, one rank after the other in this process; NaN where there is no row.

    A first round collects what each rank would send, a second hands all of it to each rank.
    """
    ranks = []
    for rank in range(table.context_parallel_size):
        sequence, position = local_rows(table, rank, masks)
        x = torch.tensor([values[s][p] for s, p in zip(sequence, position, strict=True)], dtype=torch.float64)
        ranks.append((build_scan_plan(table, rank, sequence, position), x, sequence, position))
    sent: list[torch.Tensor] = []

    def collect(local: torch.Tensor, group: None) -> torch.Tensor:
        sent.append(local)
        return local.expand(len(ranks), *local.shape).contiguous()

    result = [np.full(len(v), np.nan) for v in values]
    gathering = importlib.import_module(
        f"megatron_fipo.objective.{'future_kl' if kernels == 'torch' else 'kernels.launch'}"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_fipo.objective.future_kl.check_group", lambda *_: None)
        patch.setattr(gathering, "all_gather", collect)
        for plan, x, _, _ in ranks:
            scan_future_kl(x, x.new_ones(len(x), 1), plan, half_life, kernels=kernels)
        patch.setattr(gathering, "all_gather", lambda local, group: torch.stack(sent))
        for plan, x, sequence, position in ranks:
            future_kl, totals = scan_future_kl(x, x.new_ones(len(x), 1), plan, half_life, kernels=kernels)
            assert totals[:, 0].tolist() == [mask.sum() for mask in masks]
            for s, p, f in zip(sequence, position, future_kl.tolist(), strict=True):
                result[s][p] = f
    return result


def random_case(
    seed: int, lengths: list[int], share: float = 0.7
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    random = np.random.default_rng(seed)
    masks = [random.random(n) < share for n in lengths]
    return [np.where(m, random.standard_normal(len(m)), 0.0) for m in masks], masks
