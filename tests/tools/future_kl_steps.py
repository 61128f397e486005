"""Mini-steps with drawn numbers, for the analysis of FutureKL."""

import numpy as np

from megatron_fipo.objective.config import ObjectiveConfig
from tools.future_kl.samplers import ENGINE
from tools.future_kl.tokens import MiniStep

OBJECTIVE = ObjectiveConfig(half_life=8.0, influence_clip=(0.8, 1.2))


def mini_step(
    log_ratio: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    iteration: int = 1,
    number: int = 2,
    responses_per_group: int = 2,
    seed: int = 0,
) -> MiniStep:
    """With these log-ratios [B, L]; everything else is drawn. Without a mask all responses are complete."""
    rng = np.random.default_rng((seed, iteration, number))
    responses, length = log_ratio.shape
    mask = np.ones(log_ratio.shape, dtype=bool) if mask is None else mask
    old = -rng.exponential(size=log_ratio.shape) * mask
    right = rng.integers(2, size=responses)
    return MiniStep(
        iteration=iteration,
        number=number,
        mask=mask,
        lengths=length - np.argmax(mask[:, ::-1], axis=1),
        log_probs=(old + log_ratio) * mask,
        old_log_probs=old,
        entropy=rng.exponential(size=log_ratio.shape) * mask,
        samplers={ENGINE: old + 1e-3 * rng.standard_normal(log_ratio.shape) * mask},
        advantages=right - 0.5,
        accuracies=right.astype(float),
        groups=[f"{iteration}/{number}.{index // responses_per_group}" for index in range(responses)],
        metrics={},
    )


def drawn(shape: tuple[int, int], std: float, **settings: int) -> MiniStep:
    """With independent normal log-ratios, in responses of at least half of the length."""
    rng = np.random.default_rng(7)
    mask = np.arange(shape[1]) < rng.integers(shape[1] // 2, shape[1] + 1, size=shape[0])[:, None]
    return mini_step(std * rng.standard_normal(shape) * mask, mask, **settings)
