"""Which request is answered by which worker, and what happens if that fails: a state machine without Ray or a clock.

    STARTING ──loaded──> IDLE ──call──> BUSY ──ended──> IDLE
        ^                  │             │
        └────── lost ──────┴─────────────┘

A request whose worker was lost waits for that worker, which is started again, and is its first call: a second
failure is then not due to what earlier requests left in the process, and a request that kills its worker
does not get to another one. Times are arguments, in seconds of any clock.
"""

import math
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from megatron_fipo.scorer.protocol import GRACE_S, START_TIMEOUT_S


class Request(Protocol):
    """What a call to a worker carries. As text: what it is about, for a message."""

    @property
    def key(self) -> int:
        """Names the request in its result."""

    @property
    def calls(self) -> int:
        """Calls of the user's code that it may need, each with the time limit."""

    @property
    def place(self) -> int | None:
        """The worker that it is for; None for any."""

    @property
    def attempts(self) -> int:
        """Calls that it may have."""


AnyRequest = TypeVar("AnyRequest", bound=Request)


@dataclass
class _Job(Generic[AnyRequest]):
    request: AnyRequest
    attempts: int = 0


@dataclass
class _Worker(Generic[AnyRequest]):
    deadline: float
    """Until when it must have loaded or answered; inf while it is idle."""
    loaded: bool = False
    job: _Job[AnyRequest] | None = None
    """Running, or waiting for this worker to load."""
    failed_starts: int = 0
    """How often in a row it was lost before it had loaded."""

    @property
    def running(self) -> bool:
        """Whether it has a call to answer."""
        return self.loaded and self.deadline < math.inf


class WorkQueue(Generic[AnyRequest]):
    """A first-come, first-served queue of requests for workers `0 .. size-1`; those for one worker come before those for any.

    Each request ends exactly once: by `ended`, given up by `lost`, or by `withdraw`.
    """

    def __init__(self, size: int, *, timeout_s: float, now: float) -> None:
        """All workers are starting. `timeout_s` limits each call of the user's code."""
        self._timeout_s = timeout_s
        self._waiting: dict[int | None, deque[_Job[AnyRequest]]] = defaultdict(deque)
        """By place."""
        self._workers: list[_Worker[AnyRequest]] = [_Worker(now + START_TIMEOUT_S) for _ in range(size)]
        self._keys: set[int] = set()

    @property
    def outstanding(self) -> int:
        """Requests that have not ended."""
        return len(self._keys)

    def submit(self, request: AnyRequest) -> None:
        """Queue a request. Raises `ValueError` if another with its key has not ended."""
        if request.key in self._keys:
            raise ValueError(f"a request with the key {request.key} is already outstanding")
        self._keys.add(request.key)
        self._waiting[request.place].append(_Job(request))

    def start_calls(self, now: float) -> list[tuple[int, AnyRequest]]:
        """Give each idle worker a request. The returned calls (worker, request) count as running from now on."""
        calls = []
        for number, worker in enumerate(self._workers):
            if not worker.loaded or worker.running:
                continue
            waiting = self._waiting[number] or self._waiting[None]
            if worker.job is None and waiting:
                worker.job = waiting.popleft()
            if worker.job is not None:
                request = worker.job.request
                worker.job.attempts += 1
                worker.deadline = now + request.calls * self._timeout_s + GRACE_S
                calls.append((number, request))
        return calls

    # -- events ----------------------------------------------------------------------------------------------

    def loaded(self, number: int) -> None:
        worker = self._workers[number]
        worker.loaded, worker.deadline, worker.failed_starts = True, math.inf, 0

    def ended(self, number: int) -> int:
        """The worker answered its call, with a result or a failure that is final. Returns the request's key."""
        worker = self._workers[number]
        assert worker.job is not None
        key = worker.job.request.key
        worker.job, worker.deadline = None, math.inf
        self._keys.remove(key)
        return key

    def lost(self, number: int, now: float) -> int | None:
        """The worker died or is killed, and is started again.

        Returns the key of the request that is given up with it, if that had all its attempts.
        """
        worker = self._workers[number]
        worker.failed_starts += not worker.loaded
        worker.loaded, worker.deadline = False, now + START_TIMEOUT_S
        if worker.job is None or worker.job.attempts < worker.job.request.attempts:
            return None
        key = worker.job.request.key
        worker.job = None
        self._keys.remove(key)
        return key

    def withdraw(self) -> list[int]:
        """Remove the requests that wait, also those that wait for their worker, and return their keys.

        Those of running calls stay.
        """
        jobs = [job for waiting in self._waiting.values() for job in waiting]
        self._waiting.clear()
        for worker in self._workers:
            if worker.job is not None and not worker.running:
                jobs.append(worker.job)
                worker.job = None
        keys = [job.request.key for job in jobs]
        self._keys.difference_update(keys)
        return keys

    # -- questions -------------------------------------------------------------------------------------------

    def attempts(self, number: int) -> int:
        """Calls so far for the request that the worker runs or will run first; 0 without one."""
        job = self._workers[number].job
        return 0 if job is None else job.attempts

    def failed_starts(self, number: int) -> int:
        """How often in a row the worker was lost before it had loaded."""
        return self._workers[number].failed_starts

    def request_of(self, number: int) -> AnyRequest | None:
        """The request that the worker runs or will run first."""
        job = self._workers[number].job
        return None if job is None else job.request

    @property
    def next_deadline(self) -> float:
        """When a worker is overdue; inf if none has to answer."""
        return min(worker.deadline for worker in self._workers)

    def overdue(self, now: float) -> list[int]:
        """The workers that must be killed: they have not loaded or answered in time."""
        return [number for number, worker in enumerate(self._workers) if worker.deadline <= now]
