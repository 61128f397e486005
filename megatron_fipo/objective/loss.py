"""The policy loss of one rank's rows: FIPO, DAPO and GRPO, with one collective and no host synchronization.

`policy_loss` is the page to read: the numbered steps of `docs/algorithm.md`, in order, each a function below.

Rows are the response tokens that this rank holds; nothing here knows about padding, prompts or the other parts of the
sequences. The loss is returned as a sum and the number of units it sums over, so that Megatron's per-token normalization
(or a plain division) forms the mean over micro-batches, context-parallel and data-parallel ranks at once.

Notation: R rows on this rank, S sequences in the micro-batch, Δ log-ratio, r = e^Δ, A advantage, F FutureKL, f influence
weight.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.objective.config import LOG_RATIO_LIMIT, SAFE_INFLUENCE, ObjectiveConfig
from megatron_fipo.objective.correction import Mismatch, compare, correction_factor, mismatch_statistics
from megatron_fipo.objective.drop_rule import KeptSequences, apply_drop_rule
from megatron_fipo.objective.future_kl import DTYPES, torch_scan
from megatron_fipo.objective.kernels.choice import takes_triton
from megatron_fipo.objective.loss_inputs import PolicyLoss, PolicyRows, check_inputs
from megatron_fipo.objective.scan_layout import check_group, decay_rate
from megatron_fipo.objective.statistics import Statistics, maxima_over, sums_over


def policy_loss(
    log_probs: Tensor,
    entropy: Tensor | None,
    rows: PolicyRows,
    objective: ObjectiveConfig,
    cp_group: dist.ProcessGroup | None = None,
    kernels: str = "auto",
) -> PolicyLoss:
    """Loss of the rows under `objective`.

    log_probs: [R] with gradient, float32 or float64. entropy: [R] or None; it needs a gradient only for an entropy bonus.
    A response with a non-finite number in any row is excluded from the loss entirely, on every rank: it is counted, its
    gradient is exactly zero, and it affects no other response. kernels: `auto` (Triton on a GPU, else plain torch),
    `triton`, `torch`.

    Collectives: one all-gather over `cp_group` of [S, chunks + 2] float64, with zigzag 32 bytes per sequence and rank;
    every rank of the group must call. Before it, raises ValueError for shapes that disagree, for inputs that the
    objective lacks, and for `triton` if it cannot run.
    """
    check_inputs(log_probs, entropy, rows, objective)
    use_triton = takes_triton(kernels, log_probs, DTYPES)
    check_group(rows.plan, cp_group)
    if use_triton:
        # Imported here: the module imports Triton, which may be absent.
        from megatron_fipo.objective.kernels.launch import triton_policy_loss

        return triton_policy_loss(log_probs, entropy, rows, objective, cp_group)
    tokens = log_ratios(log_probs, entropy, rows, objective)  # 1
    x = without_outliers(tokens, objective)  # 2
    future_kl, counts = torch_scan(  # 3
        x, tokens.drop_counts(objective), rows.plan, decay_rate(objective.half_life), cp_group
    )
    influence = influence_weights(future_kl, objective)  # 4
    influence = safe_weights(influence, tokens, objective)  # 5
    losses = clipped_surrogate(tokens, influence, objective)  # 6
    sequences = apply_drop_rule(counts, rows, objective)  # 7
    return mean_loss(losses, future_kl, influence, tokens, sequences, rows, objective)  # 8


@dataclass(frozen=True)
class Tokens:
    """The inputs of the loss per row [R], with zeros in rows that do not count or are not finite."""

    mask: Tensor
    """bool: response tokens."""
    finite: Tensor
    """bool: every number of the row is finite."""
    advantages: Tensor
    log_ratio: Tensor
    """Δ, clamped to ±20, with gradient."""
    ratio: Tensor
    """r = e^Δ, with gradient."""
    entropy: Tensor
    reference_kl: Tensor
    mismatch: Mismatch
    """Old log-probs compared with the rollout engine's."""

    def dual_clipped(self, objective: ObjectiveConfig) -> Tensor:
        """bool [R]: A < 0 and r > c."""
        return (self.advantages < 0) & (self.ratio > objective.dual_clip)

    def drop_counts(self, objective: ObjectiveConfig) -> Tensor:
        """bool [R, 2]: rows that are not finite, dual-clipped rows. Their sums per sequence decide what is kept."""
        return torch.stack([self.mask & ~self.finite, self.dual_clipped(objective)], dim=1)


def log_ratios(
    log_probs: Tensor, entropy: Tensor | None, rows: PolicyRows, objective: ObjectiveConfig
) -> Tokens:
    """Step 1: Δ = clamp(log π − log π_old, ±20) and r = e^Δ, non-finite rows contained.

    What is masked or not finite becomes zero *before* any arithmetic: 0·NaN would bring a NaN back in backward. The
    rollout engine's log-probs count as numbers of the row only if the correction uses them.
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
    zero, reference_kl = torch.zeros_like(log_probs), torch.zeros_like(log_probs)
    if rows.reference_log_probs is not None:
        reference_kl = _k3(contained(rows.reference_log_probs - log_probs))
    return Tokens(
        mask=mask,
        finite=finite,
        advantages=contained(rows.advantages),
        log_ratio=log_ratio,
        ratio=log_ratio.exp(),
        entropy=zero if entropy is None else contained(entropy),
        reference_kl=reference_kl,
        mismatch=compare(rows.old_log_probs, rows.rollout_log_probs, usable),
    )


def without_outliers(tokens: Tokens, objective: ObjectiveConfig) -> Tensor:
    """Step 2: x = Δ·M with M = 1 if Δ ≤ ln c or without the filter, else 0, for either sign of A. [R], without gradient."""
    inlier = tokens.log_ratio <= objective.future_kl_limit
    return torch.where(inlier, tokens.log_ratio.detach(), 0.0)


def influence_weights(future_kl: Tensor, objective: ObjectiveConfig) -> Tensor:
    """Step 4: f = clip(e^F, low, high), [R] without gradient; 1 for dapo and grpo."""
    if not objective.weights_tokens:
        return torch.ones_like(future_kl)
    return future_kl.exp().clamp(*objective.influence_bounds)


def safe_weights(influence: Tensor, tokens: Tokens, objective: ObjectiveConfig) -> Tensor:
    """Step 5: f within [0.8, 1] if A < 0 and r > safety_threshold. [R]."""
    if not objective.weights_tokens:
        return influence
    unsafe = (tokens.advantages < 0) & (tokens.ratio.detach() > objective.safety_threshold)
    return torch.where(unsafe, influence.clamp(*SAFE_INFLUENCE), influence)


def clipped_surrogate(tokens: Tokens, influence: Tensor, objective: ObjectiveConfig) -> Tensor:
    """Step 6: PPO's clipped surrogate of A·f with the dual clip, times the off-policy correction if there is one. [R]."""
    advantages = tokens.advantages * influence
    loss = torch.maximum(
        -advantages * tokens.ratio, -advantages * tokens.ratio.clamp(*objective.ratio_bounds)
    )
    bound = -advantages * objective.dual_clip
    loss = torch.where(advantages < 0, torch.minimum(loss, bound), loss)
    if objective.corrects:
        loss = correction_factor(tokens.mismatch.weight, objective) * loss
    return loss


def mean_loss(
    surrogate: Tensor,
    future_kl: Tensor,
    influence: Tensor,
    tokens: Tokens,
    sequences: KeptSequences,
    rows: PolicyRows,
    objective: ObjectiveConfig,
) -> PolicyLoss:
    """Step 8: the sum over kept rows of surrogate, KL and entropy terms; the units it is a mean over; what is reported."""
    sequence = rows.plan.row_sequence
    kept = (sequences.kept[sequence] & tokens.mask).to(surrogate.dtype)
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
    statistics = Statistics.pack(sums | token_sums(tokens, finite, future_kl, influence, objective))
    return PolicyLoss(loss_sum, normalizer, influence, future_kl, kept, statistics)


@torch.no_grad()
def token_sums(
    tokens: Tokens, finite: Tensor, future_kl: Tensor, influence: Tensor, objective: ObjectiveConfig
) -> dict[str, Tensor]:
    """What is reported per token: sums and maxima over the rows of finite responses (`finite`, bool [R]), by name."""
    lowest, highest = objective.influence_bounds
    ratio_low, ratio_high = objective.ratio_bounds
    # e^F reaches e^107 at the recipe's half life; capped like the log-ratio, so that a mean of float32 stays finite.
    raw_influence = future_kl.clamp(max=LOG_RATIO_LIMIT).exp()
    values = {
        "finite_tokens": torch.ones_like(future_kl),
        "log_ratio": tokens.log_ratio,
        "log_ratio_squared": tokens.log_ratio.square(),
        "entropy": tokens.entropy,
        "reference_kl": tokens.reference_kl,
        "clipped_high": (tokens.advantages > 0) & (tokens.ratio > ratio_high),
        "clipped_low": (tokens.advantages < 0) & (tokens.ratio < ratio_low),
        "dual_clipped": tokens.dual_clipped(objective),
        "influence": influence,
        "influence_at_low": raw_influence <= lowest,
        "influence_at_high": raw_influence >= highest,
        "influence_raw": raw_influence,
    }
    extremes = {"influence_max": influence, "influence_negative_min": -influence}
    mismatch = mismatch_statistics(tokens.mismatch, finite, objective.correction_cap)
    return (
        sums_over(finite, values) | maxima_over(finite, extremes) | mismatch | {"tokens": tokens.mask.sum()}
    )


def _k3(log_ratio: Tensor) -> Tensor:
    """k3 = e^u − u − 1 with u = log reference − log policy: an unbiased, non-negative estimate of KL(policy ‖ reference)."""
    log_ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return log_ratio.exp() - log_ratio - 1
