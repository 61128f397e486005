"""The policy loss of one rank's rows: FIPO, DAPO, GRPO, with one collective and no host synchronisation.

Rows are the response tokens this rank holds; nothing here knows about padding, prompts or the sequences' other parts. The
loss comes back as a sum and the number of units it is a sum over, so that Megatron's per-token normalisation (or a plain
division) makes the mean over micro-batches, context-parallel and data-parallel ranks at once.

Letters: R rows on this rank, S sequences in the micro-batch.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Optional

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.objective.config import LOG_RATIO_LIMIT, PolicyObjective
from megatron_fipo.objective.correction import Mismatch, compare, correction_factor, mismatch_statistics
from megatron_fipo.objective.future_kl import scan_future_kl
from megatron_fipo.objective.scan_plan import ScanPlan
from megatron_fipo.objective.statistics import Statistics, maxima_where, sums_where

SAFE_INFLUENCE = (0.8, 1.0)
"""Range of the influence weight where the safety rule holds."""


@dataclass(frozen=True)
class PolicyRows:
    """What the loss knows about each row besides its log-probability. All per-row tensors are float32 (float64 in tests)."""

    old_log_probs: Tensor
    """[R], under the weights at the start of the iteration."""
    advantages: Tensor
    """[R]."""
    last_row: Tensor
    """[R], 1.0 on the last response row of each sequence (one row over all context-parallel ranks), else 0.0."""
    response_length: Tensor
    """[S], response tokens of each sequence over all context-parallel ranks."""
    plan: ScanPlan
    """Where the rows lie; knows the sequence of each row."""
    reference_log_probs: Optional[Tensor] = None
    """[R], under the initial model; only for a KL term."""
    rollout_log_probs: Optional[Tensor] = None
    """[R], under the rollout engine that sampled: for the off-policy correction, and compared with the old ones where given."""
    mask: Optional[Tensor] = None
    """bool [R]: rows that count. None where every row is a response token, as in packed batches."""

    def to(self, device: torch.device | str) -> "PolicyRows":
        """The same rows on `device`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: value.to(device) for name, value in values.items() if value is not None})


@dataclass(frozen=True)
class PolicyLoss:
    """The loss of one micro-batch on one rank. Mini-batch loss = Σ loss_sum / Σ normalizer over micro-batches and ranks."""

    loss_sum: Tensor
    """0-d, with gradient; 0 with a graph attached where nothing is kept, so that backward runs on every rank."""
    normalizer: Tensor
    """0-d, a whole number: the tokens or sequences this rank contributes to the denominator."""
    influence_weights: Tensor
    """[R], the paper's f; 1 for dapo and grpo."""
    future_kl: Tensor
    """[R]."""
    kept: Tensor
    """[R], 1.0 for rows in the loss, 0.0 for rows of dropped or non-finite responses."""
    statistics: Statistics


@dataclass(frozen=True)
class _Tokens:
    """The loss's inputs per row [R], with zeros wherever a row does not count or is not finite."""

    mask: Tensor
    """bool: response tokens."""
    finite: Tensor
    """bool: every number of the row is finite."""
    advantages: Tensor
    log_ratio: Tensor
    """Δ, clamped to ±20, with gradient."""
    ratio: Tensor
    entropy: Tensor
    reference_kl: Tensor
    mismatch: Mismatch
    """Of the old log-probs and the rollout engine's."""


def policy_loss(
    log_probs: Tensor,
    entropy: Optional[Tensor],
    rows: PolicyRows,
    objective: PolicyObjective,
    cp_group: Optional[dist.ProcessGroup] = None,
) -> PolicyLoss:
    """Loss of the rows under `objective`. `docs/algorithm.md` goes through the steps.

    log_probs: [R] with gradient, float32 or float64. entropy: [R] or None; it needs a gradient only for an entropy bonus.
    A response with a non-finite number in any row leaves the loss whole, on every rank: it is counted, its gradient is
    exactly zero, and no other response notices.

    Collectives: the all-gather of `scan_future_kl` over `cp_group`, with zigzag 32 bytes per sequence and rank; every rank
    of the group must call. Raises ValueError, before it, for shapes that disagree and for inputs that the objective lacks.
    """
    _check_inputs(log_probs, entropy, rows, objective)
    settings = objective.settings
    tokens = _contain_non_finite(log_probs, entropy, rows, objective)

    dual_clipped = (tokens.advantages < 0) & (tokens.ratio > settings.dual_clip)
    in_future_kl = tokens.log_ratio <= math.log(settings.dual_clip)
    future_kl, totals = scan_future_kl(
        torch.where(in_future_kl, tokens.log_ratio, 0.0).detach(),
        torch.stack([tokens.mask & ~tokens.finite, dual_clipped], dim=1),
        rows.plan,
        settings.half_life,
        cp_group,
    )
    non_finite = totals[:, 0] > 0
    dropped = ~non_finite & (totals[:, 1] > 1) & objective.drops
    kept_sequences = ~(non_finite | dropped)  # [S]
    kept = (kept_sequences[rows.plan.row_sequence] & tokens.mask).to(log_probs.dtype)

    influence = _influence_weights(future_kl, tokens, objective)
    surrogate = _surrogate(tokens, influence, objective)
    if objective.corrects:
        surrogate = correction_factor(tokens.mismatch.weight, objective) * surrogate
    loss = surrogate
    if objective.kl_coefficient:
        loss = loss + objective.kl_coefficient * tokens.reference_kl
    if objective.entropy_coefficient:
        loss = loss - objective.entropy_coefficient * tokens.entropy
    row_weight, normalizer = _normalization(rows, kept, kept_sequences, objective)
    loss_sum = (row_weight * loss).sum()

    sums = {
        "loss": loss_sum,
        "normalizer": normalizer,
        "token_mean_loss": (kept * surrogate).sum(),
        "reference_loss": (kept * surrogate).sum() * _reference_weight(rows, kept_sequences),
        "sequences": rows.last_row.sum(),
        "kept_tokens": kept.sum(),
        "dropped_sequences": (rows.last_row * dropped[rows.plan.row_sequence]).sum(),
        "nonfinite_sequences": (rows.last_row * non_finite[rows.plan.row_sequence]).sum(),
    }
    finite = ~non_finite[rows.plan.row_sequence] & tokens.mask
    statistics = Statistics.pack(sums | _token_statistics(tokens, finite, future_kl, influence, objective))
    return PolicyLoss(loss_sum, normalizer, influence, future_kl, kept, statistics)


def _check_inputs(log_probs: Tensor, entropy: Optional[Tensor], rows: PolicyRows, objective: PolicyObjective) -> None:
    if log_probs.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"log_probs must be float32 or float64, not {log_probs.dtype}")
    given = {"log_probs": log_probs, "entropy": entropy}
    per_row = ("old_log_probs", "advantages", "last_row", "reference_log_probs", "rollout_log_probs", "mask")
    given |= {name: getattr(rows, name) for name in per_row}
    for name, value in given.items():
        if value is not None and value.shape != (rows.plan.num_rows,):
            raise ValueError(f"{name} has shape {list(value.shape)}, but the plan has {rows.plan.num_rows} rows")
    if rows.response_length.shape != (rows.plan.num_sequences,):
        lengths = list(rows.response_length.shape)
        raise ValueError(f"response_length has shape {lengths}, but the plan has {rows.plan.num_sequences} sequences")
    if objective.kl_coefficient and rows.reference_log_probs is None:
        raise ValueError(f"kl_coefficient is {objective.kl_coefficient}, but the rows have no reference_log_probs")
    if objective.corrects and rows.rollout_log_probs is None:
        raise ValueError(f"correction is {objective.correction}, but the rows have no rollout_log_probs")
    if objective.entropy_coefficient and entropy is None:
        raise ValueError(f"entropy_coefficient is {objective.entropy_coefficient}, but no entropy was given")


def _contain_non_finite(log_probs: Tensor, entropy: Optional[Tensor], rows: PolicyRows, objective: PolicyObjective) -> _Tokens:
    """Replace what is masked or not finite by zeros *before* any arithmetic: 0·NaN would bring a NaN back in backward.

    The rollout engine's log-probs only count as a number of the row where the correction uses them.
    """
    mask = torch.ones_like(log_probs, dtype=torch.bool) if rows.mask is None else rows.mask
    rollout_log_probs = rows.rollout_log_probs if objective.corrects else None
    inputs = (log_probs, rows.old_log_probs, rows.advantages, rows.reference_log_probs, entropy, rollout_log_probs)
    finite = torch.stack([value.detach().isfinite() for value in inputs if value is not None]).all(dim=0)
    usable = mask & finite

    def contained(value: Tensor) -> Tensor:
        return torch.where(usable, value, 0.0)

    log_ratio = contained(log_probs - rows.old_log_probs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    nothing = torch.zeros_like(log_probs)
    return _Tokens(
        mask=mask,
        finite=finite,
        advantages=contained(rows.advantages),
        log_ratio=log_ratio,
        ratio=log_ratio.exp(),
        entropy=nothing if entropy is None else contained(entropy),
        reference_kl=nothing if rows.reference_log_probs is None else _k3(contained(rows.reference_log_probs - log_probs)),
        mismatch=compare(rows.old_log_probs, rows.rollout_log_probs, usable),
    )


def _k3(log_ratio: Tensor) -> Tensor:
    """k3 = e^u − u − 1 with u = log reference − log policy: an unbiased, non-negative estimate of KL(policy ‖ reference)."""
    log_ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return log_ratio.exp() - log_ratio - 1


def _influence_weights(future_kl: Tensor, tokens: _Tokens, objective: PolicyObjective) -> Tensor:
    """f = clip(exp F), without gradient; within [0.8, 1] where the safety rule holds; 1 for dapo and grpo."""
    if objective.name != "fipo":
        return torch.ones_like(future_kl)
    weights = future_kl.exp().clamp(*objective.settings.influence_bounds)
    unsafe = (tokens.advantages < 0) & (tokens.ratio.detach() > objective.settings.safety_threshold)
    return torch.where(unsafe, weights.clamp(*SAFE_INFLUENCE), weights)


def _surrogate(tokens: _Tokens, influence: Tensor, objective: PolicyObjective) -> Tensor:
    """PPO's clipped surrogate of the influence-weighted advantage, with the dual clip."""
    advantages = tokens.advantages * influence
    loss = torch.maximum(-advantages * tokens.ratio, -advantages * tokens.ratio.clamp(*objective.ratio_bounds))
    bound = -advantages * objective.settings.dual_clip
    return torch.where(advantages < 0, torch.minimum(loss, bound), loss)


def _normalization(rows: PolicyRows, kept: Tensor, kept_sequences: Tensor, objective: PolicyObjective) -> tuple[Tensor, Tensor]:
    """Weight of each row in the sum [R], and the units this rank adds to the denominator.

    The authors' mean per micro-batch, weighted by sequences, is a sum too: Σ_mb n_mb·mean_mb = Σ over rows of n_mb / kept
    tokens of the micro-batch. What is kept is known on every context-parallel rank, so no collective is needed for it.
    """
    if objective.name == "grpo":
        return kept / rows.response_length.clamp(min=1).to(kept.dtype)[rows.plan.row_sequence], (kept * rows.last_row).sum()
    if objective.settings.normalization == "token_mean":
        return kept, kept.sum()
    return kept * _reference_weight(rows, kept_sequences).to(kept.dtype), rows.last_row.sum()


def _reference_weight(rows: PolicyRows, kept_sequences: Tensor) -> Tensor:
    """Sequences / kept tokens of the micro-batch, over all context-parallel ranks; dropped sequences count as sequences."""
    sequences = (rows.response_length > 0).sum()
    return sequences / (rows.response_length * kept_sequences).sum().clamp(min=1)


@torch.no_grad()
def _token_statistics(
    tokens: _Tokens, finite: Tensor, future_kl: Tensor, influence: Tensor, objective: PolicyObjective
) -> dict[str, Tensor]:
    """Sums and maxima over the rows of finite responses (`finite`, bool [R])."""
    lowest, highest = objective.settings.influence_bounds
    ratio_low, ratio_high = objective.ratio_bounds
    # e^F reaches e^107 at the recipe's half life; capped like the log-ratio, so that the mean of float32 numbers stays finite.
    raw_influence = future_kl.clamp(max=LOG_RATIO_LIMIT).exp()
    values = {
        "finite_tokens": torch.ones_like(future_kl),
        "log_ratio": tokens.log_ratio,
        "log_ratio_squared": tokens.log_ratio.square(),
        "entropy": tokens.entropy,
        "reference_kl": tokens.reference_kl,
        "clipped_high": (tokens.advantages > 0) & (tokens.ratio > ratio_high),
        "clipped_low": (tokens.advantages < 0) & (tokens.ratio < ratio_low),
        "dual_clipped": (tokens.advantages < 0) & (tokens.ratio > objective.settings.dual_clip),
        "influence": influence,
        "influence_at_low": raw_influence <= lowest,
        "influence_at_high": raw_influence >= highest,
        "influence_raw": raw_influence,
    }
    extremes = {"influence_max": influence, "influence_negative_min": -influence}
    mismatch = mismatch_statistics(tokens.mismatch, finite, objective.correction_cap)
    return sums_where(finite, values) | maxima_where(finite, extremes) | mismatch | {"tokens": tokens.mask.sum()}
