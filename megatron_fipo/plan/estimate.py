"""Numbers with an interval and with the calibration they rest on.

A plan adds times and bytes that come from measured rates, from data sheets and from assumptions. `Estimate` carries the
interval and the names along, so that every printed figure states what it was calibrated on, and what it was not.

The bounds of a sum are the sums of the bounds: errors of one machine's rates are not independent, so they do not average out.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Estimate:
    """A number and its interval; `low <= value <= high`. The unit is the caller's: seconds, bytes, tokens per second."""

    value: float
    low: float
    high: float
    sources: frozenset[str] = frozenset()
    """What the figures in it were calibrated on."""
    not_calibrated: frozenset[str] = frozenset()
    """Figures in it that no measurement backs here."""

    def __post_init__(self) -> None:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"{self.value} is not within {self.low} to {self.high}")

    def __add__(self, other: "Estimate") -> "Estimate":
        return Estimate(
            self.value + other.value,
            self.low + other.low,
            self.high + other.high,
            self.sources | other.sources,
            self.not_calibrated | other.not_calibrated,
        )

    def scaled(self, factor: float) -> "Estimate":
        """Times an exact number that is not negative."""
        return replace(self, value=self.value * factor, low=self.low * factor, high=self.high * factor)

    def per(self, amount: float) -> "Estimate":
        """The rate `amount / self`, such as tokens per second of an estimate in seconds. `amount` is exact."""
        return replace(self, value=amount / self.value, low=amount / self.high, high=amount / self.low)


def exact(value: float) -> Estimate:
    """A number that is certain, such as a count of bytes."""
    return Estimate(value, value, value)


NOTHING = exact(0.0)


def total(estimates: Iterable[Estimate]) -> Estimate:
    """Their sum; `NOTHING` of none."""
    return sum(estimates, NOTHING)


def latest(*estimates: Estimate) -> Estimate:
    """The larger of times that run side by side: value, low and high are each the largest."""
    return Estimate(
        max(estimate.value for estimate in estimates),
        max(estimate.low for estimate in estimates),
        max(estimate.high for estimate in estimates),
        frozenset().union(*(estimate.sources for estimate in estimates)),
        frozenset().union(*(estimate.not_calibrated for estimate in estimates)),
    )


@dataclass(frozen=True)
class Breakdown:
    """A time or an amount of memory by part. Parts are added; what overlaps completely is no part."""

    parts: Mapping[str, Estimate]

    @property
    def total(self) -> Estimate:
        return total(self.parts.values())

    @property
    def largest(self) -> str:
        """The name of the part with the largest value."""
        return max(self.parts, key=lambda name: self.parts[name].value)

    def scaled(self, factor: float) -> "Breakdown":
        """Every part times an exact number."""
        return Breakdown({name: part.scaled(factor) for name, part in self.parts.items()})


def added(breakdowns: Iterable[Breakdown]) -> Breakdown:
    """Part by part, the sum."""
    parts: dict[str, Estimate] = {}
    for breakdown in breakdowns:
        for name, part in breakdown.parts.items():
            parts[name] = parts.get(name, NOTHING) + part
    return Breakdown(parts)
