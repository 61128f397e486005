"""Launches the Triton kernels for FutureKL and the policy loss. Same inputs, numbers and collective as the torch path.

Forward computes the gradient of the loss sum together with the loss, as one number per row, so backward is one product.

Notation: R rows, S sequences, C chunks per sequence and rank, cp ranks.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_fipo.objective.config import LOG_RATIO_LIMIT, ObjectiveConfig
from megatron_fipo.objective.kernels import triton_loss
from megatron_fipo.objective.kernels import triton_scan as scan
from megatron_fipo.objective.loss_inputs import PolicyLoss, PolicyRows
from megatron_fipo.objective.metrics import MAXIMA, SUMS
from megatron_fipo.objective.scan_layout import BLOCK, ScanPlan, all_gather, decay_rate
from megatron_fipo.objective.statistics import Statistics

TILE = 128
"""Blocks whose aggregates a program sums at one time: those of 16,384 positions."""


@torch.no_grad()
def triton_scan(
    x: Tensor, extra_sums: Tensor, plan: ScanPlan, rate: float, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """`scan_future_kl` with Triton; `rate` is −log2 γ. x: [R] float32 or float64."""
    x, chunks = x.contiguous(), plan.chunks_per_rank
    with _on(x.device):
        aggregate = x.new_empty(plan.num_blocks, dtype=torch.float64)
        scan.scan_blocks_kernel[(plan.num_blocks,)](
            x, plan.slot_row, aggregate, GAMMA=2.0**-rate, BLOCK=BLOCK, num_warps=1
        )
        local = x.new_empty(plan.num_sequences, chunks + extra_sums.shape[1], dtype=torch.float64)
        if extra_sums.shape[1]:
            local[:, chunks:] = 0
            local[:, chunks:].index_add_(0, plan.row_sequence, extra_sums.double())
        if plan.context_parallel_size * chunks > 1:  # otherwise scan_rows_kernel does not read `local`
            _add_chunks(aggregate, None, local, plan, rate)
        gathered = all_gather(local, group)  # [cp, S, C + k]
        future_kl = torch.empty_like(x)
        scan.scan_rows_kernel[(plan.num_blocks,)](
            x,
            *_scan_tables(plan, aggregate, gathered),
            future_kl,
            WIDTH=local.shape[1],
            **_scan_constants(plan, rate),
        )
    return future_kl, gathered[:, :, chunks:].sum(dim=0)


def triton_policy_loss(
    log_probs: Tensor,
    entropy: Tensor | None,
    rows: PolicyRows,
    objective: ObjectiveConfig,
    cp_group: dist.ProcessGroup | None,
) -> PolicyLoss:
    """`policy_loss` with Triton, for inputs that it has checked."""
    loss, sums, maxima, influence, future_kl, kept = _TritonPolicyLoss.apply(
        log_probs, entropy, rows, objective, cp_group
    )
    normalizer = sums[SUMS.index("normalizer")].to(log_probs.dtype)
    return PolicyLoss(loss, normalizer, influence, future_kl, kept, Statistics(sums, maxima))


class _TritonPolicyLoss(torch.autograd.Function):
    """(log_probs [R], entropy [R] or None) → loss sum with gradient, and without: sums, maxima, f, F, kept rows."""

    @staticmethod
    def forward(ctx: Any, log_probs, entropy, rows, objective, group):
        ctx.set_materialize_grads(False)
        with _on(log_probs.device):
            outputs = _launch(log_probs, entropy, rows, objective, group)
        ctx.save_for_backward(outputs["grad_log_probs"], outputs["grad_entropy"])
        sums = outputs["sums"].sum(dim=1)
        maxima = outputs["maxima"].amax(dim=1)
        reported = (sums, maxima, *(outputs[name] for name in ("influence", "future_kl", "kept_rows")))
        ctx.mark_non_differentiable(*reported)
        return sums[SUMS.index("loss")].to(log_probs.dtype), *reported

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss, *_):
        grad_log_probs, grad_entropy = ctx.saved_tensors
        if grad_loss is None:
            return None, None, None, None, None
        by_entropy = None if grad_entropy is None else grad_entropy * grad_loss
        return grad_log_probs * grad_loss, by_entropy, None, None, None


def _launch(
    log_probs: Tensor,
    entropy: Tensor | None,
    rows: PolicyRows,
    objective: ObjectiveConfig,
    group: dist.ProcessGroup | None,
) -> dict[str, Any]:
    """The launches around the gather: outputs of `loss_rows_kernel` by name; grad_entropy may be None."""
    plan, rate = rows.plan, decay_rate(objective.half_life)
    inputs = _row_inputs(log_probs, entropy, rows)
    shared = {
        "FUTURE_KL_LIMIT": objective.future_kl_limit,
        "DUAL_CLIP": objective.dual_clip,
        "BLOCK": BLOCK,
        "num_warps": 1,
    }
    aggregate = log_probs.new_empty(plan.num_blocks, dtype=torch.float64)
    counts = log_probs.new_empty(plan.num_blocks, 2, dtype=torch.float64)
    triton_loss.loss_blocks_kernel[(plan.num_blocks,)](
        **inputs,
        slot_row=plan.slot_row,
        aggregate=aggregate,
        counts=counts,
        GAMMA=2.0**-rate,
        CORRECTS=objective.corrects,
        **shared,
    )
    chunks = plan.chunks_per_rank
    local = log_probs.new_empty(plan.num_sequences, chunks + 2, dtype=torch.float64)
    _add_chunks(aggregate, counts, local, plan, rate)
    gathered = all_gather(local, group)  # [cp, S, C + 2]
    outputs = _row_outputs(log_probs, plan, objective.entropy_coefficient != 0)
    names = (
        "slot_row", "block_segment", "aggregate", "first_block", "gathered", "chunk_distance", "is_later", "row_distance", "num_sequences",
    )  # fmt: skip
    triton_loss.loss_rows_kernel[(plan.num_blocks,)](
        **inputs,
        last_row=rows.last_row.contiguous(),
        **dict(zip(names, _scan_tables(plan, aggregate, gathered), strict=True)),
        response_length=rows.response_length.contiguous(),
        **outputs,
        **triton_loss.loss_constants(objective),
        **(_scan_constants(plan, rate) | shared),
    )
    return outputs


def _add_chunks(aggregate: Tensor, counts: Tensor | None, local: Tensor, plan: ScanPlan, rate: float) -> None:
    """Fill `local` [S, C + k]: the aggregate of each chunk, then the column sums of `counts` if given."""
    scan.chunk_sums_kernel[(plan.num_sequences,)](
        aggregate, counts, plan.first_block, plan.first_row_offset, local,
        RATE=rate, C=plan.chunks_per_rank, K=0 if counts is None else counts.shape[1], WIDTH=local.shape[1], BLOCK=BLOCK, TILE=TILE,
        num_warps=4,
    )  # fmt: skip


def _scan_tables(plan: ScanPlan, aggregate: Tensor, gathered: Tensor) -> tuple[Tensor | int, ...]:
    return (
        plan.slot_row, plan.block_segment, aggregate, plan.first_block, gathered, plan.chunk_distance, plan.is_later, plan.row_distance,
        plan.num_sequences,
    )  # fmt: skip


def _scan_constants(plan: ScanPlan, rate: float) -> dict[str, Any]:
    ranks, chunks = plan.context_parallel_size, plan.chunks_per_rank
    sources = 1 << (ranks * chunks - 1).bit_length()
    constants = {"GAMMA": 2.0**-rate, "RATE": rate, "CP": ranks, "C": chunks, "SOURCES": sources}
    return constants | {"BLOCK": BLOCK, "TILE": TILE, "num_warps": 1}


def _row_inputs(log_probs: Tensor, entropy: Tensor | None, rows: PolicyRows) -> dict[str, Tensor | None]:
    given = {
        "log_probs": log_probs,
        "old_log_probs": rows.old_log_probs,
        "advantages": rows.advantages,
        "mask": None if rows.mask is None else rows.mask.view(torch.uint8),
        "entropy": entropy,
        "reference": rows.reference_log_probs,
        "rollout": rows.rollout_log_probs,
    }
    return {name: None if value is None else value.contiguous() for name, value in given.items()}


def _row_outputs(log_probs: Tensor, plan: ScanPlan, entropy_gradient: bool) -> dict[str, Any]:
    per_row = ("grad_log_probs", "influence", "future_kl", "kept_rows")
    outputs: dict[str, Any] = {name: torch.empty_like(log_probs) for name in per_row}
    outputs["grad_entropy"] = torch.empty_like(log_probs) if entropy_gradient else None
    outputs["sums"] = log_probs.new_empty(len(SUMS), plan.num_blocks, dtype=torch.float64)
    outputs["maxima"] = log_probs.new_empty(len(MAXIMA), plan.num_blocks, dtype=torch.float64)
    if not plan.num_blocks:  # torch refuses the maximum over no columns
        outputs["maxima"] = log_probs.new_full((len(MAXIMA), 1), -torch.inf, dtype=torch.float64)
    return outputs


def _on(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


if triton_loss.LIMIT.value != LOG_RATIO_LIMIT:
    raise RuntimeError(
        f"the kernels clamp log-ratios at ±{triton_loss.LIMIT.value}, the torch path at ±{LOG_RATIO_LIMIT}"
    )
