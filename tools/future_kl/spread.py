"""How wide F and f are spread, and from where: the token's own log-ratio or those after it. Pure numpy.

F_t = x_t + γ·F_{t+1}, where x is the token's own part and the rest comes from later tokens. With L = F − x

    var(F) = var(x) + var(L) + 2 cov(x, L)        own share = cov(x, F) / var(F)        later share = cov(L, F) / var(F)

so the shares add up to 1, and each has half of the interaction 2 cov(x, L). For comparison: if each x kept its size and had a
random sign, F_t² would be Σ_{k≥t} γ^(2(k−t))·x_k² on average (`Tokens.power`). More than that means that the log-ratios of a
response add up, less that they cancel.
"""

from dataclasses import dataclass

import numpy as np

from tools.future_kl.tokens import DISTANCE, Tokens

FIRST_OF_BINS = (1, 2, 3, 5, 9, 17, 33, 65, 129, 257, 513, 1025, 2049, 4097, 8193)
"""The smallest number of tokens, from a token to the end, of each bin."""


@dataclass(frozen=True)
class Spread:
    """Over the tokens of a scope. Standard deviations are those of the tokens, not of a mean."""

    tokens: int
    log_ratio_std: float
    future_kl_mean: float
    future_kl_std: float
    influence_std: float
    at_low: float
    """Share of tokens with e^F at or below the lower bound of f, before the safety rule."""
    at_high: float
    own_share: float | None
    """None if F is constant."""
    later_share: float | None
    interaction: float | None
    """2 cov(x, L) / var(F): positive if the log-ratios of a response go together."""
    own_share_of_random_signs: float | None
    """mean x² / mean power; about 1 − γ² for long responses."""


def spread(tokens: Tokens, bounds: tuple[float, float]) -> Spread:
    """Of F and f, whose clip has these bounds."""
    raw, variance = np.exp(tokens.future_kl), float(tokens.future_kl.var())
    later = tokens.future_kl - tokens.own
    own_share = later_share = interaction = random_signs = None
    if variance > 0:
        own_share = _covariance(tokens.own, tokens.future_kl) / variance
        later_share = _covariance(later, tokens.future_kl) / variance
        random_signs = float(np.square(tokens.own).mean() / tokens.power.mean())
        interaction = 2 * _covariance(tokens.own, later) / variance
    return Spread(
        tokens=len(tokens),
        log_ratio_std=float(tokens.log_ratio.std()),
        future_kl_mean=float(tokens.future_kl.mean()),
        future_kl_std=float(tokens.future_kl.std()),
        influence_std=float(tokens.influence.std()),
        at_low=float((raw <= bounds[0]).mean()),
        at_high=float((raw >= bounds[1]).mean()),
        own_share=own_share,
        later_share=later_share,
        interaction=interaction,
        own_share_of_random_signs=random_signs,
    )


@dataclass(frozen=True)
class DistanceBin:
    """The tokens that have so many tokens to the end of their response, themselves included."""

    first: int
    last: int
    tokens: int
    log_ratio_std: float
    future_kl_mean: float
    future_kl_std: float
    std_of_random_signs: float
    """sqrt(mean power)."""


def by_distance(tokens: Tokens) -> list[DistanceBin]:
    """F with the distance to the end of the response; bins without tokens are left out."""
    to_end = tokens.covariates[DISTANCE] + 1
    bins = []
    for first, beyond in zip(FIRST_OF_BINS, (*FIRST_OF_BINS[1:], np.inf), strict=True):
        chosen = (to_end >= first) & (to_end < beyond)
        if not chosen.any():
            continue
        future_kl = tokens.future_kl[chosen]
        bins.append(
            DistanceBin(
                first=first,
                last=int(min(beyond - 1, to_end.max())),
                tokens=int(chosen.sum()),
                log_ratio_std=float(tokens.log_ratio[chosen].std()),
                future_kl_mean=float(future_kl.mean()),
                future_kl_std=float(future_kl.std()),
                std_of_random_signs=float(np.sqrt(tokens.power[chosen].mean())),
            )
        )
    return bins


def _covariance(one: np.ndarray, other: np.ndarray) -> float:
    return float(((one - one.mean()) * (other - other.mean())).mean())
