"""From measured points to figures. Pure arithmetic.

Every model here is linear: seconds = sum of coefficient · feature, with coefficients that are not negative. Errors count in
relation to the measured time, so that short and long calls have the same weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

LEAST_HALF = 1.0
"""Features. `Products.half` is positive, and one feature makes no difference to any product."""
MOST_HALF = 8.0
"""In units of the longest measured short side: beyond it the half cannot be told from points."""
IMPROVEMENT = 1e-9
"""A coefficient more must lower the sum of squared relative errors by so much per point."""
SPREAD = (0.1, 0.9)
"""Quantiles of the repetitions of a point, between which its time is taken to lie."""
LEAST_SHARE = 1e-3
"""Share of the time that a coefficient stands for that explains nothing: planning needs all of them to be positive."""


@dataclass(frozen=True)
class Point:
    """Seconds of the repetitions of one call, and what it did: the factors of a model's coefficients."""

    features: tuple[float, ...]
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))


@dataclass(frozen=True)
class Fit:
    """Coefficients, and the range of measured / predicted time; `low <= 1 <= high`."""

    coefficients: tuple[float, ...]
    low: float
    high: float

    def predict(self, features: Sequence[float]) -> float:
        """Seconds."""
        return float(np.dot(self.coefficients, features))


@dataclass(frozen=True)
class Value:
    """A fitted number; `low <= value <= high`."""

    value: float
    low: float
    high: float


def fit(points: Sequence[Point]) -> Fit:
    """The coefficients with the least sum of squared relative errors. One that explains nothing is 0.

    Of all subsets of coefficients that have a solution without a negative one, the best is the optimum. There are at most three
    coefficients, so all are tried, fewer first. ValueError without points.
    """
    if not points:
        raise ValueError("nothing was measured")
    times = np.array([point.median for point in points])
    rows = np.array([point.features for point in points], dtype=np.float64) / times[:, None]
    best, least = np.zeros(rows.shape[1]), np.inf
    for count in range(1, rows.shape[1] + 1):
        for columns in combinations(range(rows.shape[1]), count):
            solution = _solve(rows[:, columns])
            if solution is None:
                continue
            error = float(((rows[:, columns] @ solution - 1) ** 2).sum())
            if error < least - IMPROVEMENT * len(points):
                best, least = np.zeros(rows.shape[1]), error
                best[list(columns)] = solution
    return _with_spread(tuple(map(float, best)), points)


def _solve(rows: np.ndarray) -> np.ndarray | None:
    """Least squares of `rows @ x = 1`; None if it is not unique or has a coefficient that is not positive."""
    scale = np.abs(rows).max(axis=0)
    if not scale.all():
        return None
    solution, _, rank, _ = np.linalg.lstsq(rows / scale, np.ones(len(rows)), rcond=1e-9)
    return solution / scale if rank == rows.shape[1] and (solution > 0).all() else None


def _with_spread(coefficients: tuple[float, ...], points: Sequence[Point]) -> Fit:
    ratios = [np.quantile(point.seconds, SPREAD) / np.dot(coefficients, point.features) for point in points]
    low, high = (float(ratio) for ratio in (np.min(ratios), np.max(ratios)))
    return Fit(coefficients, min(low, 1.0), max(high, 1.0))


def fit_rate(points: Sequence[Point]) -> Value:
    """Amount per second, of points with one feature: the amount. Total amount over total time."""
    total = sum(point.features[0] for point in points) / sum(point.median for point in points)
    spread = _with_spread((1 / total,), points)
    return as_rate(spread.coefficients[0], spread)


def fit_seconds(points: Sequence[Point]) -> Value:
    """Seconds per unit of the one feature."""
    return as_seconds((fitted := fit(points)).coefficients[0], fitted)


def fit_products(points: Sequence[Point]) -> tuple[Value, float]:
    """(rate, half) of `plan.machine.Products`, of points with the features (operations, short side of the weight).

    seconds = operations / rate · (1 + half / side). With one side only, half is not known and is `LEAST_HALF`.
    """
    sides = [point.features[1] for point in points]
    linear = [
        Point((point.features[0], point.features[0] / point.features[1]), point.seconds) for point in points
    ]
    per_operation, per_operation_and_side = fit(linear).coefficients
    most = MOST_HALF * max(sides)
    half = min(most, per_operation_and_side / per_operation) if per_operation else most
    half = max(LEAST_HALF, half)
    scaled = [Point((point.features[0] * (1 + half / point.features[1]),), point.seconds) for point in points]
    fitted = fit(scaled)
    return as_rate(fitted.coefficients[0], fitted), half


def fit_link(points: Sequence[Point]) -> tuple[Value, Value]:
    """(bytes per second, seconds per step) of points with the features (steps, bytes moved)."""
    fitted = positive(fit(points), points)
    per_step, per_byte = fitted.coefficients
    return as_rate(per_byte, fitted), as_seconds(per_step, fitted)


@dataclass(frozen=True)
class Decoding:
    """The four figures of a decoding step, as `plan.machine.Machine` has them."""

    weights: Value
    cache: Value
    step: Value
    sequence: Value


def fit_decoding(
    points: Sequence[Point], weight_bytes: float, cache_bytes: float, weight_rate: float
) -> Decoding:
    """Of points with the features (steps, sequences of all steps, cached tokens of all steps).

    All points have the same weights, so what a step takes for them cannot be told from what it takes in addition. `weight_rate`,
    bytes per second of narrow products, tells: the addition is the rest, and at least 5 % of both.
    `weight_bytes` and `cache_bytes` (per token) are those of one device.
    """
    fitted = positive(fit(points), points)
    constant, per_sequence, per_token = fitted.coefficients
    weights = min(weight_bytes / weight_rate, 0.95 * constant)
    return Decoding(
        weights=as_rate(weights / weight_bytes, fitted),
        cache=as_rate(per_token / cache_bytes, fitted),
        step=as_seconds(constant - weights, fitted),
        sequence=as_seconds(per_sequence, fitted),
    )


def positive(fitted: Fit, points: Sequence[Point]) -> Fit:
    """Coefficients of 0 raised to `LEAST_SHARE` of the time of the point with the most of them. ValueError if none has any."""
    coefficients = []
    for index, coefficient in enumerate(fitted.coefficients):
        most = [point.median / point.features[index] for point in points if point.features[index]]
        if not most:
            raise ValueError("the points do not vary in everything that the figures depend on")
        coefficients.append(coefficient or LEAST_SHARE * min(most))
    return _with_spread(tuple(coefficients), points)


def as_rate(seconds_per_unit: float, fitted: Fit) -> Value:
    """Units per second."""
    rate = 1 / seconds_per_unit
    return Value(rate, rate / fitted.high, rate / fitted.low)


def as_seconds(seconds: float, fitted: Fit) -> Value:
    return Value(seconds, seconds * fitted.low, seconds * fitted.high)
