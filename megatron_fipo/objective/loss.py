"""The policy loss of one rank's rows: FIPO, DAPO, GRPO, with one collective and no host synchronisation.

Rows are the response tokens this rank holds; nothing here knows about padding, prompts or the sequences' other parts. The
loss comes back as a sum and the number of units it is a sum over, so that Megatron's per-token normalisation (or a plain
division) makes the mean over micro-batches, context-parallel and data-parallel ranks at once.

Letters: R rows on this rank, S sequences in the micro-batch.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.objective.config import LOG_RATIO_LIMIT, SAFE_INFLUENCE, PolicyObjective
from megatron_fipo.objective.correction import Mismatch, compare, correction_factor, mismatch_statistics
from megatron_fipo.objective.drop_rule import judge_sequences
from megatron_fipo.objective.future_kl import scan_future_kl
from megatron_fipo.objective.kernels.choice import takes_triton
from megatron_fipo.objective.loss_inputs import PolicyLoss, PolicyRows, check_inputs
from megatron_fipo.objective.metrics import Statistics, maxima_where, sums_where


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
    entropy: Tensor | None,
    rows: PolicyRows,
    objective: PolicyObjective,
    cp_group: dist.ProcessGroup | None = None,
    kernels: str = "auto",
) -> PolicyLoss:
    """Loss of the rows under `objective`. `docs/algorithm.md` goes through the steps.

    log_probs: [R] with gradient, float32 or float64. entropy: [R] or None; it needs a gradient only for an entropy bonus.
    A response with a non-finite number in any row leaves the loss whole, on every rank: it is counted, its gradient is
    exactly zero, and no other response notices. kernels: `auto` (Triton on a GPU, else plain torch), `triton`, `torch`.

    Collectives: the all-gather of `scan_future_kl` over `cp_group`, with zigzag 32 bytes per sequence and rank; every rank
    of the group must call. Raises ValueError, before it, for shapes that disagree, for inputs that the objective lacks, and for
    `triton` where it cannot run.
    """
    check_inputs(log_probs, entropy, rows, objective)
    if takes_triton(kernels, log_probs, (torch.float32, torch.float64)):
        from megatron_fipo.objective.kernels.launch import fused_policy_loss

        return fused_policy_loss(log_probs, entropy, rows, objective, cp_group)
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
        kernels="torch",
    )
    sequences = judge_sequences(totals, rows, objective)
    sequence = rows.plan.row_sequence
    kept = (sequences.kept[sequence] & tokens.mask).to(log_probs.dtype)

    influence = _influence_weights(future_kl, tokens, objective)
    surrogate = _surrogate(tokens, influence, objective)
    if objective.corrects:
        surrogate = correction_factor(tokens.mismatch.weight, objective) * surrogate
    loss = surrogate
    if objective.kl_coefficient:
        loss = loss + objective.kl_coefficient * tokens.reference_kl
    if objective.entropy_coefficient:
        loss = loss - objective.entropy_coefficient * tokens.entropy
    loss_sum = (kept * sequences.weight[sequence] * loss).sum()
    units = {"kept_tokens": kept, "kept_sequences": kept * rows.last_row, "sequences": rows.last_row}
    normalizer = units[objective.unit].sum()

    sums = {
        "loss": loss_sum,
        "normalizer": normalizer,
        "token_mean_loss": (kept * surrogate).sum(),
        "reference_loss": (kept * surrogate).sum() * sequences.reference_weight,
        "sequences": rows.last_row.sum(),
        "kept_tokens": kept.sum(),
        "dropped_sequences": (rows.last_row * sequences.dropped[sequence]).sum(),
        "nonfinite_sequences": (rows.last_row * sequences.non_finite[sequence]).sum(),
    }
    finite = ~sequences.non_finite[sequence] & tokens.mask
    statistics = Statistics.pack(sums | _token_statistics(tokens, finite, future_kl, influence, objective))
    return PolicyLoss(loss_sum, normalizer, influence, future_kl, kept, statistics)


def _contain_non_finite(
    log_probs: Tensor, entropy: Tensor | None, rows: PolicyRows, objective: PolicyObjective
) -> _Tokens:
    """Replace what is masked or not finite by zeros *before* any arithmetic: 0·NaN would bring a NaN back in backward.

    The rollout engine's log-probs only count as a number of the row where the correction uses them.
    """
    mask = torch.ones_like(log_probs, dtype=torch.bool) if rows.mask is None else rows.mask
    rollout_log_probs = rows.rollout_log_probs if objective.corrects else None
    inputs = (
        log_probs,
        rows.old_log_probs,
        rows.advantages,
        rows.reference_log_probs,
        entropy,
        rollout_log_probs,
    )
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
        reference_kl=nothing
        if rows.reference_log_probs is None
        else _k3(contained(rows.reference_log_probs - log_probs)),
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
    loss = torch.maximum(
        -advantages * tokens.ratio, -advantages * tokens.ratio.clamp(*objective.ratio_bounds)
    )
    bound = -advantages * objective.settings.dual_clip
    return torch.where(advantages < 0, torch.minimum(loss, bound), loss)


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
    return (
        sums_where(finite, values) | maxima_where(finite, extremes) | mismatch | {"tokens": tokens.mask.sum()}
    )
