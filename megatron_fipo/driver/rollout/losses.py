"""What happened to engines and requests, and the sentence with which a run ends when no engine can serve."""

import logging
from dataclasses import dataclass

from megatron_fipo.driver.rollout.fleet import Fleet, State
from megatron_fipo.errors import UserError

logger = logging.getLogger(__name__)


@dataclass
class PoolCounts:
    """What happened to engines and requests."""

    retries: int = 0
    """Requests sent again, counted each time."""
    restarts: int = 0
    """Engines started again, for any reason."""
    deaths: int = 0
    """Engines whose process ended."""
    hangs: int = 0
    """Engines that did not answer a call, a health probe or an abort in time."""
    malformed: int = 0
    """Malformed replies, answers to health probes included."""


class Losses:
    """Counts and logs lost engines, and knows why the last one was lost."""

    def __init__(self, max_restarts: int, *, resumable: bool) -> None:
        """`resumable`: the run that the engines serve can be resumed, if it had begun."""
        self.counts = PoolCounts()
        self.refusal: UserError | None = None
        """Raised by an engine for a reason that the user can fix: a restart would not help."""
        self.loaded = False
        """Whether an engine has ever loaded its model."""
        self._max_restarts = max_restarts
        self._resumable = resumable
        self._last = ""

    def take_counts(self) -> PoolCounts:
        """The counts since the last call."""
        counts, self.counts = self.counts, PoolCounts()
        return counts

    def lost(self, fleet: Fleet, number: int, reason: str, count: str | None) -> None:
        """Engine `number` was lost; `count` names the field of `PoolCounts` for it, `fleet` decided what follows."""
        if count is not None:
            setattr(self.counts, count, getattr(self.counts, count) + 1)
        retired = fleet.numbers(State.RETIRED)
        if number in retired:
            next_step = f"is given up after {self._max_restarts} restarts; {fleet.size - len(retired)} left"
        else:
            self.counts.restarts += 1
            next_step = f"is started again ({fleet.restarts(number)} of {self._max_restarts} times)"
        self._last = f"engine {number} {reason}"
        logger.warning("rollout engine %d %s and %s", number, reason, next_step)

    def raise_failure(self, fleet: Fleet) -> None:
        """Raises `UserError` if an engine refused, or if no engine is left."""
        if self.refusal is not None:
            raise self.refusal
        if len(fleet.numbers(State.RETIRED)) < fleet.size:
            return
        what = "no rollout engine is left" if self.loaded else "no rollout engine could start"
        advice = "; run the same command to resume" if self.loaded and self._resumable else ""
        raise UserError(
            f"{what} after rollout.max_restarts = {self._max_restarts} restarts of each; the last reason: {self._last}{advice}"
        )
