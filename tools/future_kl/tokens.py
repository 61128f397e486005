"""The numbers of each token of a mini-step, as the trainer had them, and FutureKL by the project's own scan.

Notation: B responses of a mini-step, L the longest of them, N sampled tokens of one or more mini-steps, Δ log-ratio, F FutureKL, f
influence weight, γ decay per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from megatron_fipo import fipo_loss, future_kl
from megatron_fipo.objective.config import ObjectiveConfig
from megatron_fipo.objective.scan_layout import decay_rate

ENTROPY_WINDOW = 32
"""Tokens after a token over which entropy is averaged."""
RELATIVE_POSITION = "relative position"
DISTANCE = "distance to the end"
CORRECT = "correctness"
NEXT_ENTROPY = f"entropy of the next {ENTROPY_WINDOW} tokens"


@dataclass(frozen=True, eq=False)
class MiniStep:
    """The responses of one mini-step under the weights before its update. [B, L] float64, 0 where `mask` is False."""

    iteration: int
    """From 1: the weights at its start are those of the checkpoint of the iteration before."""
    number: int
    """From 1."""
    mask: np.ndarray
    """bool [B, L]: tokens that the policy sampled."""
    lengths: np.ndarray
    """int64 [B]: response tokens, those of tools included."""
    log_probs: np.ndarray
    """Under the current weights."""
    old_log_probs: np.ndarray
    """Under the weights at the start of the iteration, by the trainer."""
    entropy: np.ndarray
    """Of the current policy, in nats."""
    samplers: dict[str, np.ndarray]
    """Log-probs under other policies that might stand in for the old ones, by name."""
    advantages: np.ndarray
    """[B]."""
    accuracies: np.ndarray
    """[B]: 1 right, 0 wrong."""
    groups: list[str]
    """[B]: the prompt group, a name that no other iteration has."""
    metrics: dict[str, float]
    """What the update reported, by the names of `objective/metrics.py`."""
    outcomes: dict[str, np.ndarray] = field(default_factory=dict)
    """More about each token, by name; NaN where undefined."""


@dataclass(frozen=True, eq=False)
class Influence:
    """Of each position [B, L] against some old log-probs."""

    log_ratio: np.ndarray
    """Δ."""
    future_kl: np.ndarray
    """F, 0 for masked positions after the last token."""
    weight: np.ndarray
    """f, safety rule included."""


def influence(step: MiniStep, old: np.ndarray, objective: ObjectiveConfig) -> Influence:
    """F and f of the current log-probs against `old` [B, L], by the project's loss in float64."""
    advantages = np.broadcast_to(step.advantages[:, None], step.mask.shape)
    arrays = (step.log_probs, old, advantages.copy(), step.mask)
    plain = replace(objective, correction="none", entropy_coefficient=0.0)  # neither changes F or f
    result = fipo_loss(*map(torch.from_numpy, arrays), plain)
    return Influence(step.log_probs - old, result.future_kl.numpy(), result.influence_weights.numpy())


@dataclass(frozen=True, eq=False)
class Tokens:
    """The sampled tokens of some mini-steps, in float64 [N]."""

    log_ratio: np.ndarray
    future_kl: np.ndarray
    own: np.ndarray
    """What the token itself adds to its F: Δ, or 0 where the filter excludes it."""
    influence: np.ndarray
    gain: np.ndarray
    """Σ_{k≥t} γ^(2(k−t)): the variance that independent errors of variance 1 give F; (1 − γ^2n)/(1 − γ²) with n tokens to the end."""
    power: np.ndarray
    """Σ_{k≥t} γ^(2(k−t))·x_k² with x the own parts: the mean of F² if each x kept its size and had a random sign."""
    groups: np.ndarray
    """Names of the prompt groups."""
    covariates: dict[str, np.ndarray]
    """By name; NaN where undefined."""

    def __len__(self) -> int:
        return len(self.future_kl)

    def where(self, chosen: np.ndarray) -> "Tokens":
        """Those with True in `chosen` [N]."""
        arrays = {name: value[chosen] for name, value in vars(self).items() if name != "covariates"}
        return Tokens(**arrays, covariates={name: value[chosen] for name, value in self.covariates.items()})


def tokens_of(step: MiniStep, objective: ObjectiveConfig) -> Tokens:
    """The sampled tokens of a mini-step, response by response."""
    mask, found = step.mask, influence(step, step.old_log_probs, objective)
    gamma = 2.0 ** -decay_rate(objective.half_life)
    later = gamma * np.pad(found.future_kl[:, 1:], ((0, 0), (0, 1)))  # F_t = own_t + γ·F_{t+1}
    own = np.where(mask, found.future_kl - later, 0.0)

    def with_squared_decay(values: np.ndarray) -> np.ndarray:
        half_life = objective.half_life / 2  # of γ²
        return future_kl(torch.from_numpy(values), torch.from_numpy(mask), half_life).numpy()[mask]

    groups = np.broadcast_to(np.array(step.groups)[:, None], mask.shape)
    return Tokens(
        log_ratio=found.log_ratio[mask],
        future_kl=found.future_kl[mask],
        own=own[mask],
        influence=found.weight[mask],
        gain=with_squared_decay(np.ones(mask.shape)),
        power=with_squared_decay(own**2),
        groups=groups[mask],
        covariates={name: values[mask] for name, values in covariates(step).items()},
    )


def covariates(step: MiniStep) -> dict[str, np.ndarray]:
    """What F is compared with, [B, L] each."""
    position = np.broadcast_to(np.arange(step.mask.shape[1]), step.mask.shape)
    last = step.lengths[:, None] - 1

    def per_response(values: np.ndarray) -> np.ndarray:
        return np.broadcast_to(values[:, None], step.mask.shape)

    return {
        RELATIVE_POSITION: position / np.maximum(last, 1),
        DISTANCE: (last - position).astype(float),
        "entropy": step.entropy,
        NEXT_ENTROPY: next_mean(step.entropy, step.mask, ENTROPY_WINDOW),
        "advantage": per_response(step.advantages),
        CORRECT: per_response(step.accuracies),
        **step.outcomes,
    }


def next_mean(values: np.ndarray, mask: np.ndarray, window: int) -> np.ndarray:
    """Mean of `values` [B, L] over the masked positions among the `window` after each position; NaN if there are none."""
    sums = np.pad(np.cumsum(values * mask, axis=1), ((0, 0), (1, 0)))
    counts = np.pad(np.cumsum(mask, axis=1), ((0, 0), (1, 0)))
    first = np.arange(mask.shape[1]) + 1
    end = np.minimum(first + window, mask.shape[1])
    count = counts[:, end] - counts[:, first]
    return np.where(count > 0, (sums[:, end] - sums[:, first]) / np.maximum(count, 1), np.nan)


def pooled(parts: Sequence[Tokens]) -> Tokens:
    """All tokens of several mini-steps."""
    arrays = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in vars(parts[0])
        if name != "covariates"
    }
    names = parts[0].covariates
    return Tokens(
        **arrays,
        covariates={name: np.concatenate([part.covariates[name] for part in parts]) for name in names},
    )
