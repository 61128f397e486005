"""Correlations over tokens, with intervals by a bootstrap over prompt groups. Pure numpy, deterministic.

The tokens of a response share later log-ratios, and the responses to a prompt a problem, so single tokens are not independent
samples: whole groups are drawn with replacement. A correlation needs six sums over tokens, which add up over groups, so a
resample is a weighted sum of those of the groups. Spearman's correlation is Pearson's of the ranks over all tokens, ties at
their mean; resamples keep these ranks.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from megatron_fipo.study.statistics import LEVEL, widening
from tools.future_kl.tokens import CORRECT, Tokens

RESAMPLES = 2_000
ALL, WRONG, RIGHT = "all", "wrong", "right"
"""Responses."""


@dataclass(frozen=True)
class Interval:
    """A correlation; None where it is not defined: a constant, or bounds from fewer than two groups."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Correlation:
    """Of F or f with one covariate over the tokens of some responses."""

    responses: str
    of: str
    covariate: str
    tokens: int
    """Those for which the covariate is defined."""
    groups: int
    pearson: Interval
    spearman: Interval


def correlations(tokens: Tokens, seed: int) -> list[Correlation]:
    """Of F and f with every covariate, over all, wrong and right responses."""
    tokens = replace(tokens, groups=np.unique(tokens.groups, return_inverse=True)[1])  # numbers sort faster
    right = tokens.covariates[CORRECT] > 0
    subsets = {ALL: np.ones_like(right), WRONG: ~right, RIGHT: right}
    found = []
    for responses, chosen in subsets.items():
        subset = tokens.where(chosen)
        for name, values in subset.covariates.items():
            defined = subset.where(~np.isnan(values))
            covariate = defined.covariates[name]
            for of, target in (("F", defined.future_kl), ("f", defined.influence)):
                pearson, groups = correlate(target, covariate, defined.groups, seed)
                spearman, _ = correlate(ranks(target), ranks(covariate), defined.groups, seed)
                found.append(Correlation(responses, of, name, len(defined), groups, pearson, spearman))
    return found


def correlate(x: np.ndarray, y: np.ndarray, groups: np.ndarray, seed: int) -> tuple[Interval, int]:
    """Pearson's correlation of x and y [N] with its interval, and the number of groups."""
    names, members = np.unique(groups, return_inverse=True)
    count = len(names)
    if not _varies(x) or not _varies(y):
        return Interval(None), count
    x, y = (x - x.mean()) / x.std(), (y - y.mean()) / y.std()
    terms = (np.ones_like(x), x, y, x * x, y * y, x * y)
    sums = np.stack([np.bincount(members, weights=term, minlength=count) for term in terms], axis=1)
    value = float(_of_sums(sums.sum(axis=0)))
    if count < 2:
        return Interval(value), count
    resampled = _of_sums(_draws(count, seed) @ sums)
    low, high = np.nanquantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    factor = widening(count)  # as the intervals of studies, for few groups
    bounds = (value - factor * (value - low), value + factor * (high - value))
    return Interval(value, *(float(np.clip(bound, -1, 1)) for bound in bounds)), count


@lru_cache(maxsize=8)
def _draws(groups: int, seed: int) -> np.ndarray:
    """How often each resample has each group: float64 [RESAMPLES, groups]."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(groups, np.full(groups, 1 / groups), size=RESAMPLES).astype(float)


def ranks(values: np.ndarray) -> np.ndarray:
    """From 1; equal values have the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _varies(values: np.ndarray) -> bool:
    return len(values) > 1 and bool(values.min() < values.max())


def _of_sums(sums: np.ndarray) -> np.ndarray:
    """Correlations from [..., 6]: count, Σx, Σy, Σx², Σy², Σxy; NaN where a resample is constant."""
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    variances = (n * xx - x * x) * (n * yy - y * y)
    positive = variances > 0
    return np.where(positive, (n * xy - x * y) / np.sqrt(np.where(positive, variances, 1.0)), np.nan)
