"""FIPO, DAPO and GRPO written out token by token in float64: slow, dense, obvious. The reference of every fast path.

Nothing here knows about ranks, packing or blocks. `log_probs` may be the output of a model, so that `loss.backward()` also
gives the gradient of every parameter.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fipo.objective.config import ObjectiveConfig


@dataclass
class Response:
    """One response, float64 [n] each; `mask` is 0 for tokens the policy did not sample."""

    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    mask: Tensor
    reference_log_probs: Tensor | None = None
    entropy: Tensor | None = None
    rollout_log_probs: Tensor | None = None

    @property
    def tokens(self) -> list[int]:
        """Positions that count."""
        return [t for t in range(len(self.mask)) if self.mask[t]]


@dataclass
class OracleResult:
    loss: Tensor
    """0-d, with gradient."""
    future_kl: list[Tensor]
    """Per response [n]."""
    influence_weights: list[Tensor]
    """Per response [n]."""
    kept: list[bool]
    """Per response: is it in the loss."""


def future_kl_by_definition(x: Tensor, half_life: float) -> Tensor:
    """F_t = Σ_{k≥t} γ^(k−t)·x_k, the sum as written, with 0^0 = 1."""
    gamma = 2.0 ** (-1.0 / half_life)
    powers = torch.tensor([gamma**k for k in range(len(x))], dtype=torch.float64)
    return torch.stack([(powers[: len(x) - t] * x[t:]).sum() for t in range(len(x))]) if len(x) else x.clone()


def oracle_loss(
    responses: Sequence[Response],
    objective: ObjectiveConfig,
    micro_batches: Sequence[Sequence[int]] | None = None,
) -> OracleResult:
    """The loss of a mini-batch. `micro_batches` (indices into the responses) only matter for `reference_micro_batch`."""
    answers = [_response_loss(response, objective) for response in responses]
    token_losses, future_kl, weights, kept = (list(column) for column in zip(*answers, strict=True))
    loss = _mean(token_losses, kept, objective, micro_batches or [range(len(responses))])
    loss = loss + sum(
        0.0 * response.log_probs[:0].sum() for response in responses
    )  # a graph, even if nothing is kept
    return OracleResult(loss, future_kl, weights, kept)


def _response_loss(response: Response, objective: ObjectiveConfig) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Loss of each token that counts, F and f of every position, and whether the response is kept."""
    settings = objective
    tokens = response.tokens
    if not _is_finite(response, objective):
        nothing = torch.zeros(len(response.mask), dtype=torch.float64)
        return nothing[:0], nothing, nothing, False
    delta = (response.log_probs - response.old_log_probs).clamp(-20, 20)
    ratio = delta.exp()
    x = torch.zeros(len(delta), dtype=torch.float64)
    for t in tokens:
        if not settings.filter_future_kl or delta[t].item() <= math.log(settings.dual_clip):
            x[t] = delta[t].detach()
    future_kl = future_kl_by_definition(x, settings.half_life)

    weights = torch.ones(len(delta), dtype=torch.float64)
    if objective.name == "fipo":
        low, high = settings.influence_clip or (0.0, 10.0)
        for t in range(len(delta)):
            weights[t] = min(max(math.exp(future_kl[t].item()), low), high)
            if response.advantages[t] < 0 and ratio[t] > settings.safety_threshold:
                weights[t] = min(max(weights[t].item(), 0.8), 1.0)

    dual_clipped = [t for t in tokens if response.advantages[t] < 0 and ratio[t] > settings.dual_clip]
    kept = not (objective.name == "fipo" and settings.drop_dual_clipped and len(dual_clipped) > 1)

    # -Ã·min(r, 1+high) where Ã >= 0; -Ã·min(max(r, 1-low), c) where Ã < 0
    clip_high = settings.clip_low if objective.name == "grpo" else settings.clip_high
    advantage = response.advantages * weights
    bounded = ratio.clamp(min=1 - settings.clip_low).clamp(max=settings.dual_clip)
    loss = -advantage * torch.where(advantage >= 0, ratio.clamp(max=1 + clip_high), bounded)
    if objective.correction != "none":
        loss = loss * torch.tensor(
            [_correction(response, t, objective) for t in range(len(delta))], dtype=torch.float64
        )
    if objective.kl_coefficient:
        assert response.reference_log_probs is not None
        gap = response.reference_log_probs - response.log_probs
        loss = loss + objective.kl_coefficient * (gap.exp() - gap - 1)
    if objective.entropy_coefficient:
        assert response.entropy is not None
        loss = loss - objective.entropy_coefficient * response.entropy
    return loss[tokens], future_kl, weights, kept


def _correction(response: Response, t: int, objective: ObjectiveConfig) -> float:
    """What token t's policy loss is multiplied by: a number, not a function of the policy being trained. 1 for masked tokens."""
    if not response.mask[t]:
        return 1.0
    assert response.rollout_log_probs is not None
    difference = response.old_log_probs[t].item() - response.rollout_log_probs[t].item()
    weight = math.exp(min(max(difference, -20.0), 20.0))
    if objective.correction == "tis":
        return min(weight, objective.correction_cap)
    return weight if weight <= objective.correction_cap else 0.0


def _is_finite(response: Response, objective: ObjectiveConfig) -> bool:
    tokens = response.tokens
    given = [
        response.log_probs,
        response.old_log_probs,
        response.advantages,
        response.reference_log_probs,
        response.entropy,
    ]
    if objective.correction != "none":
        given.append(response.rollout_log_probs)
    return all(bool(values[tokens].isfinite().all()) for values in given if values is not None)


def _mean(
    token_losses: list[Tensor],
    kept: list[bool],
    objective: ObjectiveConfig,
    micro_batches: Sequence[Sequence[int]],
) -> Tensor:
    """The mean that the objective asks for; 0 over nothing."""

    def token_mean(indices: Sequence[int]) -> Tensor:
        losses = [token_losses[i] for i in indices if kept[i]]
        return torch.cat(losses).mean() if sum(map(len, losses)) else torch.zeros((), dtype=torch.float64)

    if objective.name == "grpo" or objective.normalization == "response_mean":
        means = [
            losses.mean() for losses, keep in zip(token_losses, kept, strict=True) if keep and len(losses)
        ]
        return torch.stack(means).mean() if means else torch.zeros((), dtype=torch.float64)
    if objective.normalization == "token_mean":
        return token_mean(range(len(kept)))
    # The authors' release: each micro-batch's mean, weighted by its sequences, dropped ones included.
    sequences = [sum(1 for i in members if len(token_losses[i]) or not kept[i]) for members in micro_batches]
    means = [token_mean(members) for members in micro_batches]
    weights = torch.tensor(sequences, dtype=torch.float64) / max(sum(sequences), 1)
    return (weights * torch.stack(means)).sum()
