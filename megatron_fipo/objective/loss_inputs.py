"""Inputs and results of the policy loss of one micro-batch on one rank.

Notation: R rows on this rank, S sequences in the micro-batch.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from megatron_fipo.objective.config import ObjectiveConfig
from megatron_fipo.objective.scan_layout import ScanPlan
from megatron_fipo.objective.statistics import Statistics


@dataclass(frozen=True)
class PolicyRows:
    """Inputs of the loss per row besides its log-probability. All per-row tensors are float32 (float64 in tests)."""

    old_log_probs: Tensor
    """[R], under the weights at the start of the iteration."""
    advantages: Tensor
    """[R]."""
    last_row: Tensor
    """[R], 1.0 on the last response row of each sequence (one row over all context-parallel ranks), else 0.0."""
    response_length: Tensor
    """[S], response tokens of each sequence over all context-parallel ranks."""
    plan: ScanPlan
    """Index tables of the scan, with the sequence of each row."""
    reference_log_probs: Tensor | None = None
    """[R], under the initial model; only for a KL term."""
    rollout_log_probs: Tensor | None = None
    """[R], under the rollout engine that sampled: for the off-policy correction; if given, compared with the old ones."""
    mask: Tensor | None = None
    """bool [R]: rows that count. None if every row is a response token, as in packed batches."""

    def to(self, device: torch.device | str) -> "PolicyRows":
        """The same rows on `device`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self, **{name: value.to(device) for name, value in values.items() if value is not None}
        )


@dataclass(frozen=True)
class PolicyLoss:
    """The loss of one micro-batch on one rank. Mini-batch loss = Σ loss_sum / Σ normalizer over micro-batches and ranks."""

    loss_sum: Tensor
    """0-d, with gradient; 0 with a graph attached if nothing is kept, so that backward runs on every rank."""
    normalizer: Tensor
    """0-d, an integer: the tokens or sequences this rank contributes to the denominator."""
    influence_weights: Tensor
    """[R], the paper's f; 1 for dapo and grpo."""
    future_kl: Tensor
    """[R]."""
    kept: Tensor
    """[R], 1.0 for rows in the loss, 0.0 for rows of dropped or non-finite responses."""
    statistics: Statistics


def check_inputs(
    log_probs: Tensor, entropy: Tensor | None, rows: PolicyRows, objective: ObjectiveConfig
) -> None:
    """Raise ValueError for dtypes and shapes that disagree, and for inputs that the objective lacks."""
    if log_probs.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"log_probs must be float32 or float64, not {log_probs.dtype}")
    given = {"log_probs": log_probs, "entropy": entropy}
    per_row = ("old_log_probs", "advantages", "last_row", "reference_log_probs", "rollout_log_probs", "mask")
    given |= {name: getattr(rows, name) for name in per_row}
    for name, value in given.items():
        if value is not None and value.shape != (rows.plan.num_rows,):
            raise ValueError(
                f"{name} has shape {list(value.shape)}, but the plan has {rows.plan.num_rows} rows"
            )
    if rows.response_length.shape != (rows.plan.num_sequences,):
        lengths = list(rows.response_length.shape)
        raise ValueError(
            f"response_length has shape {lengths}, but the plan has {rows.plan.num_sequences} sequences"
        )
    if objective.kl_coefficient and rows.reference_log_probs is None:
        raise ValueError(
            f"kl_coefficient is {objective.kl_coefficient}, but the rows have no reference_log_probs"
        )
    if objective.corrects and rows.rollout_log_probs is None:
        raise ValueError(f"correction is {objective.correction}, but the rows have no rollout_log_probs")
    if objective.entropy_coefficient and entropy is None:
        raise ValueError(f"entropy_coefficient is {objective.entropy_coefficient}, but no entropy was given")
