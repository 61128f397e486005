"""Which group is scored by which scorer, and what happens if that fails: a state machine without Ray or a clock.

    STARTING ──loaded──> IDLE ──call──> BUSY ──ended──> IDLE
        ^                  │             │
        └────── lost ──────┴─────────────┘

A request whose scorer was lost waits for that scorer, which is started again, and is its first call: a second
failure is then not due to what earlier requests left in the process, and a request that kills its scorer
does not get to another one. Times are arguments, in seconds of any clock.
"""

import math
from collections import deque
from dataclasses import dataclass

from megatron_fipo.scorer.protocol import ScoreRequest

START_TIMEOUT_S = 600.0
"""Seconds a scorer may take to load."""
GRACE_S = 15.0
"""Seconds that a call may take in addition to the time limits of its responses."""
MAX_ATTEMPTS = 2
"""Calls for one request."""


@dataclass
class _Job:
    request: ScoreRequest
    attempts: int = 0


@dataclass
class _Scorer:
    deadline: float
    """Until when it must have loaded or answered; inf while it is idle."""
    loaded: bool = False
    job: _Job | None = None
    """Running, or waiting for this scorer to load."""
    failed_starts: int = 0
    """How often in a row it was lost before it had loaded."""

    @property
    def running(self) -> bool:
        """Whether it has a call to answer."""
        return self.loaded and self.deadline < math.inf


class ScoringQueue:
    """A first-come, first-served queue of requests for scorers `0 .. size-1`.

    Each request ends exactly once: by `ended`, given up by `lost`, or by `withdraw`.
    """

    def __init__(self, size: int, *, timeout_s: float, now: float) -> None:
        """All scorers are starting. `timeout_s` limits each response."""
        self._timeout_s = timeout_s
        self._waiting: deque[_Job] = deque()
        self._scorers = [_Scorer(now + START_TIMEOUT_S) for _ in range(size)]
        self._keys: set[int] = set()

    @property
    def outstanding(self) -> int:
        """Requests that have not ended."""
        return len(self._keys)

    def submit(self, request: ScoreRequest) -> None:
        """Queue a request. Raises `ValueError` if another with its key has not ended."""
        if request.key in self._keys:
            raise ValueError(f"a request with the key {request.key} is already outstanding")
        self._keys.add(request.key)
        self._waiting.append(_Job(request))

    def start_calls(self, now: float) -> list[tuple[int, ScoreRequest]]:
        """Give each idle scorer a request. The returned calls (scorer, request) count as running from now on."""
        calls = []
        for number, scorer in enumerate(self._scorers):
            if not scorer.loaded or scorer.running:
                continue
            if scorer.job is None and self._waiting:
                scorer.job = self._waiting.popleft()
            if scorer.job is not None:
                request = scorer.job.request
                scorer.job.attempts += 1
                scorer.deadline = now + len(request.responses) * self._timeout_s + GRACE_S
                calls.append((number, request))
        return calls

    # -- events ----------------------------------------------------------------------------------------------

    def loaded(self, number: int) -> None:
        scorer = self._scorers[number]
        scorer.loaded, scorer.deadline, scorer.failed_starts = True, math.inf, 0

    def ended(self, number: int) -> int:
        """The scorer answered its call, with scores or a failure that is final. Returns the request's key."""
        scorer = self._scorers[number]
        assert scorer.job is not None
        key = scorer.job.request.key
        scorer.job, scorer.deadline = None, math.inf
        self._keys.remove(key)
        return key

    def lost(self, number: int, now: float) -> int | None:
        """The scorer died or is killed, and is started again.

        Returns the key of the request that is given up with it, if that had all its attempts.
        """
        scorer = self._scorers[number]
        scorer.failed_starts += not scorer.loaded
        scorer.loaded, scorer.deadline = False, now + START_TIMEOUT_S
        if scorer.job is None or scorer.job.attempts < MAX_ATTEMPTS:
            return None
        key = scorer.job.request.key
        scorer.job = None
        self._keys.remove(key)
        return key

    def withdraw(self) -> list[int]:
        """Remove the requests that wait, also those that wait for their scorer, and return their keys.

        Those of running calls stay.
        """
        jobs = list(self._waiting)
        self._waiting.clear()
        for scorer in self._scorers:
            if scorer.job is not None and not scorer.running:
                jobs.append(scorer.job)
                scorer.job = None
        keys = [job.request.key for job in jobs]
        self._keys.difference_update(keys)
        return keys

    # -- questions -------------------------------------------------------------------------------------------

    def attempts(self, number: int) -> int:
        """Calls so far for the request that the scorer runs or will run first; 0 without one."""
        job = self._scorers[number].job
        return 0 if job is None else job.attempts

    def failed_starts(self, number: int) -> int:
        """How often in a row the scorer was lost before it had loaded."""
        return self._scorers[number].failed_starts

    def request_of(self, number: int) -> ScoreRequest | None:
        """The request that the scorer runs or will run first."""
        job = self._scorers[number].job
        return None if job is None else job.request

    @property
    def next_deadline(self) -> float:
        """When a scorer is overdue; inf if none has to answer."""
        return min(scorer.deadline for scorer in self._scorers)

    def overdue(self, now: float) -> list[int]:
        """The scorers that must be killed: they have not loaded or answered in time."""
        return [number for number, scorer in enumerate(self._scorers) if scorer.deadline <= now]
