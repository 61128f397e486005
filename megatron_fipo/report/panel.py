"""What a report panel is. Pure data."""

from dataclasses import dataclass
from typing import Literal

Color = Literal["blue", "orange", "teal", "magenta", "grey", "brown", "violet", "sky", "green", "red", "gold"]
Unit = Literal["number", "share", "s", "GiB", "tokens/s"]
"""`share`: a fraction, shown as a percentage. Units other than `number` and `share` stand in the panel's heading."""


@dataclass(frozen=True)
class Line:
    """One metric of a panel."""

    metric: str
    label: str
    color: Color = "blue"
    dashed: bool = False
    note: str = ""
    """A sentence after the panel's caption, shown if the run has the metric."""


@dataclass(frozen=True)
class Band:
    """The area between two metrics."""

    low: str
    high: str
    label: str
    color: Color = "blue"


@dataclass(frozen=True)
class Panel:
    """One small chart over iterations. A panel is not shown if the run has none of its metrics."""

    title: str
    caption: str
    """What it shows, and what is healthy."""
    lines: tuple[Line, ...]
    band: Band | None = None
    unit: Unit = "number"
    """Of all lines."""
    reference: float | None = None
    """A horizontal line to compare with."""
    stacked: bool = False
    """The lines are parts of a sum, drawn as areas on top of each other."""
    from_zero: bool = False
    """The axis begins at 0."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of all metrics that the panel shows."""
        band = (self.band.low, self.band.high) if self.band else ()
        return (*(line.metric for line in self.lines), *band)


@dataclass(frozen=True)
class Section:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]
