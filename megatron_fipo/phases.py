"""The phases of an iteration, and the clock that divides its wall time between them."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """A part of an iteration's wall time, logged as `time/<name>`."""

    name: str
    label: str
    """In the console and the report."""
    meaning: str
    """What the driver does, for the table in docs/metrics.md."""


PHASES = (
    Phase("rollout", "rollout", "waits for the groups of this iteration"),
    Phase("plan", "plan", "computes advantages and packing and stores the batch for the ranks"),
    Phase(
        "handover",
        "handover",
        "sends the batch to the ranks, and waits for the slowest rank after the reporting one",
    ),
    Phase("old_log_probs", "old log-probs", "waits for log-probs of the old and the reference policy"),
    Phase("update", "update", "waits for all mini-steps"),
    Phase(
        "rollout_wait",
        "rollout wait",
        "waits after the update for groups of the next iteration (`one_step_off`)",
    ),
    Phase("weight_sync", "weight sync", "waits until the engines have the new weights"),
    Phase("evaluation", "evaluation", "evaluates the weights of the iteration before"),
    Phase("checkpoint", "checkpoint", "waits for a checkpoint"),
    Phase("log", "log", "writes metrics, samples and dump of the iteration before"),
    Phase("other", "other", "does everything else"),
)
"""Each moment of an iteration belongs to one of them."""


class PhaseClock:
    """Divides the wall time of a process between `PHASES`: at each moment the innermost open phase runs, else `other`."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        """`now` in seconds."""
        self._now = now
        self._open = ["other"]
        self._begin = self._last = now()
        self._seconds = _zeros()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The time of the block is that of phase `name`, without the phases opened within it."""
        self._account()
        self._open.append(name)
        try:
            yield
        finally:
            self._account()
            self._open.pop()

    def divide(self, name: str, parts: Mapping[str, float]) -> None:
        """Give seconds of phase `name` to other phases: `parts`, measured elsewhere, ran within it one after another."""
        for part, seconds in parts.items():
            self._seconds[part] += seconds
            self._seconds[name] -= seconds

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last `take` or the start; `total` is the wall time, their sum."""
        self._account()
        seconds = {**self._seconds, "total": self._last - self._begin}
        self._begin, self._seconds = self._last, _zeros()
        return seconds

    def _account(self) -> None:
        now = self._now()
        self._seconds[self._open[-1]] += now - self._last
        self._last = now


def _zeros() -> dict[str, float]:
    return {phase.name: 0.0 for phase in PHASES}
