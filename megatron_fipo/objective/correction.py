"""Off-policy correction: how far the engine that sampled lies from the trainer, and what a token's loss is weighed with for it.

Letters: μ the rollout engine's policy, π_old the trainer's at the start of the iteration, δ = log π_old − log μ of the sampled
token, w = e^δ its importance weight, R rows on this rank. Nothing here carries a gradient or talks to another rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fipo.objective.config import LOG_RATIO_LIMIT, PolicyObjective
from megatron_fipo.objective.metrics import maxima_where, sums_where


@dataclass(frozen=True)
class Mismatch:
    """What trainer and engine say about the same tokens, per row [R]."""

    known: Tensor
    """bool: both log-probs are there and finite."""
    difference: Tensor
    """δ; 0 where unknown."""
    weight: Tensor
    """w, with δ clamped to ±20; 1 where unknown."""


@torch.no_grad()
def compare(old_log_probs: Tensor, rollout_log_probs: Tensor | None, usable: Tensor) -> Mismatch:
    """δ and w of each row, from log-probs [R]; `usable` (bool [R]) are the rows whose trainer log-prob counts and is finite."""
    if rollout_log_probs is None:
        nothing = torch.zeros_like(old_log_probs)
        return Mismatch(torch.zeros_like(usable), nothing, torch.ones_like(nothing))
    known = usable & rollout_log_probs.isfinite()
    difference = torch.where(known, old_log_probs - rollout_log_probs, 0.0)
    return Mismatch(known, difference, difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp())


def correction_factor(weight: Tensor, objective: PolicyObjective) -> Tensor:
    """What multiplies each token's policy loss [R]: `tis` cuts w off at the cap, `mis` leaves a token beyond the cap out."""
    if objective.correction == "tis":
        return weight.clamp(max=objective.correction_cap)
    return torch.where(weight <= objective.correction_cap, weight, 0.0)


@torch.no_grad()
def mismatch_statistics(mismatch: Mismatch, finite: Tensor, cap: float) -> dict[str, Tensor]:
    """Sums and a maximum over the known rows of finite responses (`finite`, bool [R]), for `Statistics`.

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
    return sums_where(counted, values) | maxima_where(counted, {"rollout_difference_max": difference.abs()})
