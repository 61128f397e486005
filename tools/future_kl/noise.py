"""The noise floor of F: an independent error of standard deviation σ in every log-ratio, from another engine or precision. Pure.

It gives F_t an error of standard deviation σ·sqrt(gain_t), with gain_t = (1 − γ^2n) / (1 − γ²) for n tokens from t to the end;
over tokens σ·sqrt(mean gain). The prediction is checked: errors are drawn, added to the old log-probs, and F is computed again
by the project's scan.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_fipo.objective.config import ObjectiveConfig
from tools.future_kl.mismatch import Shift, shift
from tools.future_kl.tokens import MiniStep, Tokens

SIGMAS = (1e-3, 1e-2, 3e-2)
"""Beside that of the run's own engine."""


@dataclass(frozen=True)
class Noise:
    """One σ."""

    sigma: float
    predicted_std: float
    """σ·sqrt(mean gain)."""
    measured: Shift
    """With errors drawn and added; its `error_std` is to be compared with `predicted_std`."""


@dataclass(frozen=True)
class NoiseFloor:
    """Of the tokens of a scope."""

    critical_sigma: float
    """The σ at which the predicted error of F is as large as the standard deviation of F itself."""
    by_sigma: list[Noise]


def noise_floor(
    steps: Sequence[MiniStep], tokens: Tokens, sigmas: Sequence[float], objective: ObjectiveConfig, seed: int
) -> NoiseFloor:
    """For these σ; `tokens` are those of `steps`."""
    amplification = float(np.sqrt(tokens.gain.mean()))
    return NoiseFloor(
        float(tokens.future_kl.std() / amplification),
        [
            Noise(sigma, sigma * amplification, shift(steps, disturbed(steps, sigma, seed), objective))
            for sigma in sigmas
        ],
    )


def disturbed(steps: Sequence[MiniStep], sigma: float, seed: int) -> list[np.ndarray]:
    """The old log-probs of each mini-step with independent normal errors, the same draws for every σ."""
    rng = np.random.default_rng(seed)
    return [step.old_log_probs + sigma * rng.standard_normal(step.mask.shape) * step.mask for step in steps]
