"""What happens to F and f if other log-probs stand in for the old ones, and what a correction does to the loss. Pure.

δ = log π_old − log μ, for the trainer's old policy and another one, μ. With μ in the place of π_old each Δ becomes Δ + δ, so F
gets an error of Σ_{k≥t} γ^(k−t) δ_k: a sum over many tokens of what `correction` sees one token at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_fipo.objective.config import ObjectiveConfig
from megatron_fipo.objective.correction import compare, correction_factor
from tools.future_kl.tokens import MiniStep, influence

MOVED = 0.02
"""A weight f that differs by more has moved: a tenth of the recipe's range above 1."""


@dataclass(frozen=True)
class Shift:
    """F and f under other old log-probs against the exact ones."""

    tokens: int
    difference_std: float
    """Of δ."""
    difference_mean_size: float
    """Mean |δ|: the run's `rollout/log_prob_difference` for its engine."""
    difference_max: float
    future_kl_std: float
    """Of the exact F."""
    error_std: float
    """Of F under the other log-probs minus F."""
    signal_to_noise: float | None
    """future_kl_std / error_std; None without an error."""
    influence_correlation: float | None
    """Pearson's, of f under the other log-probs with f; None if one of them is constant."""
    moved: float
    """Share of tokens whose f moves by more than `MOVED`."""


def shift(steps: Sequence[MiniStep], others: Sequence[np.ndarray], objective: ObjectiveConfig) -> Shift:
    """`others` [B, L] stand in for the old log-probs of each mini-step."""
    difference, exact, error, weight, other_weight = [], [], [], [], []
    for step, old in zip(steps, others, strict=True):
        mask = step.mask
        before, after = influence(step, step.old_log_probs, objective), influence(step, old, objective)
        difference.append((step.old_log_probs - old)[mask])
        exact.append(before.future_kl[mask])
        error.append((after.future_kl - before.future_kl)[mask])
        weight.append(before.weight[mask])
        other_weight.append(after.weight[mask])
    delta, f, other = np.concatenate(difference), np.concatenate(weight), np.concatenate(other_weight)
    signal, noise = float(np.concatenate(exact).std()), float(np.concatenate(error).std())
    constant = not (np.ptp(f) > 0 and np.ptp(other) > 0)
    return Shift(
        tokens=len(delta),
        difference_std=float(delta.std()),
        difference_mean_size=float(np.abs(delta).mean()),
        difference_max=float(np.abs(delta).max()),
        future_kl_std=signal,
        error_std=noise,
        signal_to_noise=signal / noise if noise > 0 else None,
        influence_correlation=None if constant else float(np.corrcoef(f, other)[0, 1]),
        moved=float((np.abs(f - other) > MOVED).mean()),
    )


@dataclass(frozen=True)
class CorrectionEffect:
    """The factor that `objective.correction` puts on the loss of each token, w = e^δ at most the cap (tis) or 0 beyond it (mis)."""

    cap: float
    tis_mean: float
    mis_mean: float
    beyond_cap: float
    """Share of tokens with w above the cap: `tis` caps them, `mis` masks them."""
    effective_sample_size: float
    """(Σw)² / (n·Σw²) of the weights without a cap; 1 if all are equal."""


def correction_effect(
    steps: Sequence[MiniStep], others: Sequence[np.ndarray], objective: ObjectiveConfig
) -> CorrectionEffect:
    """If the policy with log-probs `others` [B, L] had sampled the responses."""
    weights = []
    for step, other in zip(steps, others, strict=True):
        old, sampled = (torch.from_numpy(values[step.mask]) for values in (step.old_log_probs, other))
        weights.append(compare(old, sampled, torch.ones_like(old, dtype=torch.bool)).weight)
    w = torch.cat(weights)
    factors = {
        name: float(correction_factor(w, replace(objective, correction=name)).mean())
        for name in ("tis", "mis")
    }
    return CorrectionEffect(
        cap=objective.correction_cap,
        tis_mean=factors["tis"],
        mis_mean=factors["mis"],
        beyond_cap=float((w > objective.correction_cap).double().mean()),
        effective_sample_size=float(w.sum().square() / (len(w) * w.square().sum())),
    )
