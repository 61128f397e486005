"""Which requests travel in which call to which engine, and what becomes of them when a call fails: a queue without engines or Ray."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_fipo.engine.protocol import GenerationRequest, SamplingParams


@dataclass
class _Item:
    request: GenerationRequest
    sampling: SamplingParams
    attempts: int = 0
    """Calls it has travelled in."""


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
    """Requests, first come first served. Each ends exactly once: by `answered`, given up by `failed`, or by `withdraw`.

    A request whose call failed, for whatever reason, is sent again, `max_retries` times at most; one that kills its engine would
    otherwise kill one after the other. On its last attempt it travels alone, so that it takes no other down with it.

    With `keep_batches` the requests of one `submit` are one call, on every attempt: what an engine computes may depend, in the
    last bits, on what else is in the call.
    """

    def __init__(
        self, *, requests_per_call: int, calls_at_once: int, max_retries: int, keep_batches: bool
    ) -> None:
        self._requests_per_call = requests_per_call
        self._calls_at_once = calls_at_once
        self._max_retries = max_retries
        self._keep_batches = keep_batches
        self._whole: deque[list[_Item]] = deque()
        """Calls that are complete as they are."""
        self._loose: deque[_Item] = deque()
        """Requests that fill calls."""
        self._running: dict[int, list[Call]] = {}
        self._request_ids: set[str] = set()
        self.retries = 0
        """Requests sent again, counted each time."""

    @property
    def outstanding(self) -> int:
        """Requests that have not ended."""
        return len(self._request_ids)

    def at(self, engine: int) -> list[Call]:
        """The calls running at `engine`."""
        return list(self._running.get(engine, ()))

    @property
    def busy(self) -> list[int]:
        """Engines with a running call."""
        return [engine for engine, calls in self._running.items() if calls]

    def submit(self, requests: Sequence[GenerationRequest], sampling: SamplingParams) -> None:
        """Queue the requests. Raises `ValueError` where one has the id of another that has not ended."""
        for request in requests:
            if request.request_id in self._request_ids:
                raise ValueError(f"a request with the id {request.request_id} is outstanding already")
            self._request_ids.add(request.request_id)
        items = [_Item(request, sampling) for request in requests]
        if self._keep_batches and items:
            self._whole.append(items)
        else:
            self._loose.extend(items)

    def start_calls(self, engines: Sequence[int]) -> list[Call]:
        """Fill the free places at `engines`; the calls returned are running from now on.

        Where there is less to do than fits, calls are of about equal size.
        """
        free = {engine: self._calls_at_once - len(self.at(engine)) for engine in engines}
        places = sum(free.values())
        size = self._size(places - len(self._whole))
        started = []
        for _ in range(places):
            items = self._whole.popleft() if self._whole else self._fill(size)
            if not items:
                break
            engine = max(free, key=lambda number: free[number])
            free[engine] -= 1
            self.retries += sum(item.attempts > 0 for item in items)
            for item in items:
                item.attempts += 1
            started.append(Call(engine, items[0].sampling, tuple(items)))
            self._running.setdefault(engine, []).append(started[-1])
        return started

    def answered(self, call: Call) -> None:
        self._end(call, [request.request_id for request in call.requests])

    def failed(self, call: Call) -> list[str]:
        """The call brought nothing. Its requests wait again, but for those given up for good, whose ids are returned."""
        given_up = [item.request.request_id for item in call.items if item.attempts > self._max_retries]
        self._end(call, given_up)
        again = [item for item in call.items if item.attempts <= self._max_retries]
        if self._keep_batches and again:
            self._whole.append(again)
            return given_up
        self._whole.extend([item] for item in again if item.attempts == self._max_retries)
        self._loose.extend(item for item in again if item.attempts < self._max_retries)
        return given_up

    def withdraw(self) -> list[str]:
        """Forget the requests that wait; returns their ids. Those of running calls stay."""
        waiting = [item.request.request_id for items in (*self._whole, self._loose) for item in items]
        self._whole.clear()
        self._loose.clear()
        self._request_ids.difference_update(waiting)
        return waiting

    def _end(self, call: Call, request_ids: Sequence[str]) -> None:
        self._running[call.engine].remove(call)
        self._request_ids.difference_update(request_ids)

    def _size(self, places: int) -> int:
        """Requests per call so that as few rounds as possible over `places` calls take all loose ones, evenly."""
        places = max(1, places)
        rounds = math.ceil(len(self._loose) / (places * self._requests_per_call))
        return math.ceil(len(self._loose) / (places * max(1, rounds)))

    def _fill(self, size: int) -> list[_Item]:
        """Up to `size` loose requests that are sampled alike."""
        items: list[_Item] = []
        while (
            self._loose and len(items) < size and (not items or self._loose[0].sampling == items[0].sampling)
        ):
            items.append(self._loose.popleft())
        return items
