"""Off-policy correction: the distance between rollout engine and trainer, and the factor it puts on a token's loss.

Notation: μ the rollout engine's policy, π_old the trainer's at the start of the iteration, δ = log π_old − log μ of the
sampled token, w = e^δ its importance weight, R rows on this rank. Nothing here carries a gradient or communicates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fipo.objective.config import LOG_RATIO_LIMIT, ObjectiveConfig
from megatron_fipo.objective.statistics import maxima_over, sums_over


@dataclass(frozen=True)
class Mismatch:
    """Trainer and engine on the same tokens, per row [R]."""

    known: Tensor
    """bool: both log-probs are given and finite."""
    difference: Tensor
    """δ; 0 if unknown."""
    weight: Tensor
    """w, with δ clamped to ±20; 1 if unknown."""


@torch.no_grad()
def compare(old_log_probs: Tensor, rollout_log_probs: Tensor | None, usable: Tensor) -> Mismatch:
    """δ and w of each row, from log-probs [R]; `usable` (bool [R]) marks rows whose trainer log-prob counts and is finite."""
    if rollout_log_probs is None:
        zero = torch.zeros_like(old_log_probs)
        return Mismatch(torch.zeros_like(usable), zero, torch.ones_like(zero))
    known = usable & rollout_log_probs.isfinite()
    difference = torch.where(known, old_log_probs - rollout_log_probs, 0.0)
    return Mismatch(known, difference, difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp())


def correction_factor(weight: Tensor, objective: ObjectiveConfig) -> Tensor:
    """The factor on each token's policy loss [R]: `tis` truncates w at the cap, `mis` masks a token beyond the cap."""
    if objective.correction == "tis":
        return weight.clamp(max=objective.correction_cap)
    return torch.where(weight <= objective.correction_cap, weight, 0.0)


@torch.no_grad()
def mismatch_statistics(mismatch: Mismatch, finite: Tensor, cap: float) -> dict[str, Tensor]:
    """Sums and a maximum over the known rows of finite responses (`finite`, bool [R]), by name.

    In float64: k3 of a difference of 1e-4 is 5e-9, which float32 would lose between e^δ and 1 + δ.
    """
    difference = mismatch.difference.double()
    clamped = difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    weight = clamped.exp()
    counted = mismatch.known & finite
    values = {
        "compared_tokens": torch.ones_like(weight),
        "rollout_difference": difference,
        "rollout_difference_size": difference.abs(),
        "rollout_k3": torch.expm1(clamped) - clamped,
        "importance": weight,
        "importance_squared": weight.square(),
        "importance_capped": mismatch.weight > cap,
    }
    return sums_over(counted, values) | maxima_over(counted, {"rollout_difference_max": difference.abs()})
