"""The heartbeats of the trainer's ranks: notices a rank that died between calls, and ranks that hang.

A group hangs if no rank has advanced its count of work (`progress.py`) for `timeout_s` while a method runs, or if one rank
does not answer for that long, also between methods. In a collective all wait for the slowest rank, so one rank that works is
enough; that a single rank is late is no error.
"""

import time
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta

import ray
from ray.actor import ActorHandle

from megatron_fipo.driver.actor_logs import why_it_died
from megatron_fipo.driver.rank_actor import beat

BEATS_PER_TIMEOUT = 20
LONGEST_INTERVAL_S = 30.0
"""Between two heartbeats of a rank. One takes under a millisecond of the driver's time."""
LONGEST_STEP_S = 5.0
"""What a pause of the driver counts at most: answers that arrived meanwhile tell nothing about the time since."""


@dataclass(frozen=True)
class Stall:
    """A rank that hangs, or of a group that hangs the one that worked least recently."""

    rank: int
    answers: bool
    since: float
    """Its last progress or, without an answer, the question."""


class StallWatch:
    """When a group hangs. Times are arguments, in seconds of any clock."""

    def __init__(self, size: int, timeout_s: float, now: float) -> None:
        self._timeout_s = timeout_s
        self._counts = [-1] * size
        self._advanced = [now] * size
        self._asked: dict[int, float] = {}

    def began(self, now: float) -> None:
        """A method begins on all ranks."""
        self._advanced = [now] * len(self._advanced)

    def asked(self, rank: int, now: float) -> None:
        self._asked[rank] = now

    def answered(self, rank: int, count: int, now: float) -> None:
        self._asked.pop(rank, None)
        if count != self._counts[rank]:
            self._counts[rank], self._advanced[rank] = count, now

    def finished(self, rank: int, now: float) -> None:
        """A rank returned from the method, which is progress."""
        self._advanced[rank] = now

    def stalled(self, working: Collection[int], now: float) -> Stall | None:
        """The rank to blame if the group hangs; `working` are the ranks that have not returned.

        If no rank advances, one that does not answer is to blame after half the time: it was asked later than it hangs.
        """
        hangs = bool(working) and now - max(self._advanced) >= self._timeout_s
        patience = self._timeout_s / 2 if hangs else self._timeout_s
        silent = [rank for rank, asked in self._asked.items() if now - asked >= patience]
        if silent:
            rank = min(silent, key=lambda rank: (self._asked[rank], rank))
            return Stall(rank, answers=False, since=self._asked[rank])
        if hangs:
            rank = min(working, key=lambda rank: (self._advanced[rank], rank))
            return Stall(rank, answers=True, since=self._advanced[rank])
        return None


class RankWatch:
    """Asks the ranks for heartbeats. Does nothing by itself: `look` must be called often."""

    def __init__(self, actors: list[ActorHandle], timeout_s: float) -> None:
        self._actors = actors
        self._timeout_s = timeout_s
        self._looked = time.monotonic()
        self._now = self._next = 0.0
        self._stalls = StallWatch(len(actors), timeout_s, self._now)
        self._pending: dict[ray.ObjectRef, int] = {}

    def began(self) -> None:
        """A method begins on all ranks."""
        self._stalls.began(self._time())

    def finished(self, rank: int) -> None:
        """A rank has returned from it."""
        self._stalls.finished(rank, self._time())

    def look(self, working: Collection[int] = ()) -> tuple[int, str] | None:
        """A rank that is lost and what it did, for a sentence; `working` are those that have not returned."""
        now = self._time()
        if now >= self._next:
            self._next = now + min(self._timeout_s / BEATS_PER_TIMEOUT, LONGEST_INTERVAL_S)
            for rank in set(range(len(self._actors))) - set(self._pending.values()):
                self._stalls.asked(rank, now)
                self._pending[beat(self._actors[rank])] = rank
        if (dead := self._receive(now)) is not None:
            return dead
        stall = self._stalls.stalled(working, now)
        return None if stall is None else (stall.rank, self._sentence(stall, now))

    def dead_rank(self, within_s: float) -> tuple[int, str] | None:
        """As `look`, for a rank that has died by now; asks all of them and waits for their answers."""
        self._pending |= {beat(actor): rank for rank, actor in enumerate(self._actors)}
        ray.wait(list(self._pending), num_returns=len(self._pending), timeout=within_s)
        return self._receive(self._time())

    def _receive(self, now: float) -> tuple[int, str] | None:
        pending = list(self._pending)
        done = ray.wait(pending, num_returns=len(pending), timeout=0)[0] if pending else []
        for reference in done:
            rank = self._pending.pop(reference)
            try:
                self._stalls.answered(rank, ray.get(reference), now)
            except ray.exceptions.RayError as error:
                return rank, f"died: {why_it_died(error)}"
        return None

    def _time(self) -> float:
        elapsed = time.monotonic() - self._looked
        self._looked += elapsed
        self._now += min(elapsed, LONGEST_STEP_S)
        return self._now

    def _sentence(self, stall: Stall, now: float) -> str:
        since = f"{datetime.now() - timedelta(seconds=now - stall.since):%H:%M:%S}"
        limit = f"recovery.stall_timeout_s = {self._timeout_s:g} s"
        if not stall.answers:
            return f"has not answered its heartbeat since {since} ({limit})"
        return f"hangs with all others: its last progress was at {since} ({limit})"
