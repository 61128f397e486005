"""Who does which request, and what happens when a call fails: a state machine without engines, clocks or Ray.

The pool asks for `assignments`, makes the calls, and reports each as `succeeded` or `failed` until `done`.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field


class NoEngineLeftError(Exception):
    """Requests remain and every engine is lost."""


MAX_CHUNK_COST = 512
"""Responses in one call, about as many as an engine works on at a time; between calls there is news and a chance to stop."""


@dataclass
class Dispatcher:
    """Requests `0 .. len(costs)-1`, spread over `engines` in chunks of about equal cost, one chunk at an engine at a time.

    A failed chunk is split over the remaining engines and sent again; on its last attempt a request travels alone, so that one
    bad request does not take others down with it. Every request ends exactly once, in `finished` or in `dropped`.
    """

    costs: Sequence[int]
    """Expected work per request, e.g. its number of responses."""
    engines: list[int]
    max_retries: int
    """A request is sent at most `max_retries + 1` times."""
    finished: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    retries: int = 0
    """Requests that were sent again, counted each time."""

    def __post_init__(self) -> None:
        self._attempts = [0] * len(self.costs)
        self._running: dict[int, list[int]] = {}
        self._waiting: deque[list[int]] = deque()
        self._enqueue(range(len(self.costs)))

    @property
    def done(self) -> bool:
        return not self._waiting and not self._running

    def assignments(self) -> list[tuple[int, list[int]]]:
        """(engine, requests) for the idle engines, which are busy from now on. Raises `NoEngineLeftError`."""
        if self._waiting and not self.engines:
            raise NoEngineLeftError
        started = []
        for engine in self.engines:
            if self._waiting and engine not in self._running:
                chunk = self._waiting.popleft()
                for request in chunk:
                    self._attempts[request] += 1
                self._running[engine] = chunk
                started.append((engine, chunk))
        return started

    def succeeded(self, engine: int) -> None:
        self.finished += self._running.pop(engine)

    def failed(self, engine: int, lost: bool) -> list[int]:
        """The call at `engine` gave nothing; `lost` retires the engine. Returns the requests given up for good."""
        chunk = self._running.pop(engine)
        if lost:
            self.engines.remove(engine)
        given_up = [request for request in chunk if self._attempts[request] > self.max_retries]
        self.dropped += given_up
        again = [request for request in chunk if self._attempts[request] <= self.max_retries]
        self.retries += len(again)
        self._enqueue(again)
        return given_up

    def _enqueue(self, requests: Sequence[int]) -> None:
        last = [request for request in requests if self._attempts[request] and self._attempts[request] == self.max_retries]
        others = [request for request in requests if request not in set(last)]
        self._waiting.extend([request] for request in last)
        engines = max(1, len(self.engines))
        per_engine = sum(self.costs[request] for request in others) / engines
        self._waiting.extend(split_by_cost(others, self.costs, engines * max(1, math.ceil(per_engine / MAX_CHUNK_COST))))


def split_by_cost(requests: Sequence[int], costs: Sequence[int], parts: int) -> list[list[int]]:
    """Cut `requests`, in order, into at most `parts` non-empty runs of about equal total cost."""
    total = sum(costs[request] for request in requests)
    runs: list[list[int]] = [[] for _ in range(parts)]
    before = 0
    for request in requests:
        middle = before + costs[request] / 2
        runs[min(parts - 1, int(middle * parts / total))].append(request)
        before += costs[request]
    return [run for run in runs if run]
