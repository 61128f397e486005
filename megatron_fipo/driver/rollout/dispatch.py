"""Which requests go in which call to which engine, and what happens if a call fails: a queue without Ray."""

import heapq
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_fipo.engine.protocol import GenerationRequest, SamplingParams


@dataclass
class _Item:
    request: GenerationRequest
    sampling: SamplingParams
    attempts: int = 0
    """Number of calls that contained it."""


@dataclass(frozen=True, eq=False)
class Call:
    """One call of `generate` at one engine."""

    engine: int
    sampling: SamplingParams
    items: tuple[_Item, ...]

    @property
    def requests(self) -> list[GenerationRequest]:
        return [item.request for item in self.items]


class Dispatcher:
    """A first-come, first-served queue of requests.

    Each ends exactly once: by `answered`, given up by `failed`, or by `withdraw`.

    A request whose call failed, for any reason, is sent again at most `max_retries` times; a request that
    kills its engine would otherwise kill one engine after another. Its last attempt is a call with no other
    request, so that no other fails with it.

    With `keep_batches` the requests of one `submit` form one call, on every attempt: the last bits of what an
    engine computes may depend on the other requests of the call.
    """

    def __init__(
        self, *, requests_per_call: int, calls_at_once: int, max_retries: int, keep_batches: bool
    ) -> None:
        self._requests_per_call = requests_per_call
        self._calls_at_once = calls_at_once
        self._max_retries = max_retries
        self._keep_batches = keep_batches
        self._batches: deque[list[_Item]] = deque()
        """Requests that must be one call."""
        self._loose: deque[_Item] = deque()
        """Requests that may be combined into calls."""
        self._running: dict[int, list[Call]] = {}
        self._requests: dict[int, int] = {}
        """Requests in the running calls of each engine."""
        self._request_ids: set[str] = set()
        self.retries = 0
        """Requests sent again, counted each time."""

    @property
    def outstanding(self) -> int:
        """Requests that have not ended."""
        return len(self._request_ids)

    @property
    def waiting(self) -> bool:
        """Whether a request waits for an engine."""
        return bool(self._batches or self._loose)

    def at(self, engine: int) -> list[Call]:
        """The calls running at `engine`."""
        return list(self._running.get(engine, ()))

    def requests_at(self, engine: int) -> int:
        """Requests in the calls running at `engine`."""
        return self._requests.get(engine, 0)

    @property
    def busy(self) -> list[int]:
        """Engines with a running call."""
        return [engine for engine, calls in self._running.items() if calls]

    def submit(self, requests: Sequence[GenerationRequest], sampling: SamplingParams) -> None:
        """Queue the requests. Raises `ValueError` if one has the id of another that has not ended."""
        for request in requests:
            if request.request_id in self._request_ids:
                raise ValueError(f"a request with the id {request.request_id} is already outstanding")
            self._request_ids.add(request.request_id)
        items = [_Item(request, sampling) for request in requests]
        if self._keep_batches and items:
            self._batches.append(items)
        else:
            self._loose.extend(items)

    def start_calls(self, space: Mapping[int, float]) -> list[Call]:
        """Fill the free call slots of engines. The returned calls count as running from now on.

        `space` has the number of further requests for which each engine has space. An engine without a call
        gets one in any case, and a call is not divided to fit. If there are fewer requests than slots, they
        are divided into calls of about equal size.
        """
        free = {engine: self._calls_at_once - len(self._running.get(engine, ())) for engine in space}
        size = self._size(sum(free.values()) - len(self._batches))
        # The engine with most space first, among equals the first of `space`.
        queue = [
            (-min(free[engine], left), -free[engine], place, engine, left)
            for place, (engine, left) in enumerate(space.items())
        ]
        heapq.heapify(queue)
        started = []
        while queue:
            _, calls, place, engine, left = heapq.heappop(queue)
            if -calls != self._calls_at_once and (not calls or left < 1):
                continue  # and it gets no more space until this returns
            items = self._batches.popleft() if self._batches else self._fill(size)
            if not items:
                break
            started.append(self._started(engine, items))
            left -= len(items)
            heapq.heappush(queue, (-min(-calls - 1, left), calls + 1, place, engine, left))
        return started

    def _started(self, engine: int, items: list[_Item]) -> Call:
        self.retries += sum(item.attempts > 0 for item in items)
        for item in items:
            item.attempts += 1
        call = Call(engine, items[0].sampling, tuple(items))
        self._running.setdefault(engine, []).append(call)
        self._requests[engine] = self.requests_at(engine) + len(items)
        return call

    def answered(self, call: Call) -> None:
        """The call was answered: its requests have ended."""
        self._end(call, [request.request_id for request in call.requests])

    def failed(self, call: Call) -> list[str]:
        """The call failed: its requests wait again, except those given up, whose ids are returned."""
        given_up = [item.request.request_id for item in call.items if item.attempts > self._max_retries]
        self._end(call, given_up)
        again = [item for item in call.items if item.attempts <= self._max_retries]
        if self._keep_batches and again:
            self._batches.append(again)
            return given_up
        self._batches.extend([item] for item in again if item.attempts == self._max_retries)
        self._loose.extend(item for item in again if item.attempts < self._max_retries)
        return given_up

    def withdraw(self) -> list[str]:
        """Remove the waiting requests and return their ids. Those of running calls stay."""
        waiting = [item.request.request_id for items in (*self._batches, self._loose) for item in items]
        self._batches.clear()
        self._loose.clear()
        self._request_ids.difference_update(waiting)
        return waiting

    def _end(self, call: Call, request_ids: Sequence[str]) -> None:
        self._running[call.engine].remove(call)
        self._requests[call.engine] -= len(call.items)
        self._request_ids.difference_update(request_ids)

    def _size(self, slots: int) -> int:
        """Requests per call so that the fewest rounds of `slots` calls take all loose requests, evenly."""
        slots = max(1, slots)
        rounds = math.ceil(len(self._loose) / (slots * self._requests_per_call))
        return math.ceil(len(self._loose) / (slots * max(1, rounds)))

    def _fill(self, size: int) -> list[_Item]:
        """Up to `size` loose requests with the same sampling parameters."""
        items: list[_Item] = []
        while (
            self._loose and len(items) < size and (not items or self._loose[0].sampling == items[0].sampling)
        ):
            items.append(self._loose.popleft())
        return items
