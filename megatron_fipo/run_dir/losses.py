"""What a run's log tells of its losses."""

from collections.abc import Mapping

RESTARTS = "recovery/restarts"
LOST_ITERATIONS = "recovery/lost_iterations"
"""Metrics of an iteration, both counted since the run began."""


def losses_sentence(values: Mapping[str, float]) -> str | None:
    """What an iteration's metrics count, in words for the user; None if nothing was lost."""
    restarts, lost = int(values.get(RESTARTS, 0)), int(values.get(LOST_ITERATIONS, 0))
    if not restarts and not lost:
        return None
    return f"the trainer was started again {_times(restarts)}, {lost:,} iteration{'s were' if lost != 1 else ' was'} trained again"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"
