"""What measuring processes print, a JSON value per line."""

from dataclasses import dataclass
from typing import Any

from megatron_fipo.calibrate.fitting import Point
from megatron_fipo.node.preflight.facts import from_json, to_json


@dataclass(frozen=True)
class Measured:
    """Repetitions of one call."""

    figure: str
    """Which figure, or group of figures, it is measured for."""
    features: tuple[float, ...]
    seconds: tuple[float, ...]

    @property
    def point(self) -> Point:
        return Point(self.features, self.seconds)


@dataclass(frozen=True)
class Skipped:
    """A figure that cannot be measured here."""

    figure: str
    reason: str
    """A clause."""


@dataclass(frozen=True)
class Observed:
    """A number that is read and not timed: bytes of a process, of a device."""

    figure: str
    value: float


@dataclass(frozen=True)
class Device:
    """What the ranks run on."""

    name: str
    """As CUDA reports it; "cpu" without a GPU."""
    count: int
    """GPUs of this node; 0 without."""
    memory_bytes: int
    """Of one GPU, or of the node without GPUs."""


Message = Measured | Skipped | Observed | Device
_KINDS: dict[str, type] = {kind.__name__: kind for kind in (Measured, Skipped, Observed, Device)}


def as_line(message: Message) -> list[Any]:
    """The JSON value of a message."""
    return [type(message).__name__, to_json(message)]


def from_line(line: list[Any]) -> Message:
    """The inverse of `as_line`."""
    kind, value = line
    return from_json(_KINDS[kind], value)
