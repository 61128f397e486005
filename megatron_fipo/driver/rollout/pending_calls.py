"""The remote calls to engines whose answer is pending, and their deadlines."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray

from megatron_fipo.driver.ray_wait import wait_for_one
from megatron_fipo.driver.rollout.dispatch import Call


@dataclass(frozen=True)
class PendingCall:
    """One call of an engine's method."""

    engine: int
    method: str
    deadline: float = math.inf
    """`time.monotonic()` at which it is overdue."""
    call: Call | None = None
    """The requests of a `generate`."""
    version: int | None = None
    """The weight version that a `generate` was sent for."""


class PendingCalls:
    """Pending calls by Ray object reference, in the order in which they were sent."""

    def __init__(self) -> None:
        self._calls: dict[Any, PendingCall] = {}

    def add(self, reference: Any, call: PendingCall) -> None:
        self._calls[reference] = call

    def engines(self, method: str) -> list[int]:
        """The engines that have not answered `method`, one entry per call."""
        return [call.engine for call in self._calls.values() if call.method == method]

    def answered(self, timeout_s: float) -> Iterator[tuple[Any, PendingCall]]:
        """Wait up to `timeout_s` (inf: no limit) for an answer, then remove and yield all answered calls.

        A call that is discarded during the iteration is not yielded.
        """
        references = list(self._calls)
        if not references:
            time.sleep(timeout_s)
            return
        wait_for_one(references, timeout_s)
        for reference in ray.wait(references, num_returns=len(references), timeout=0)[0]:
            if (call := self._calls.pop(reference, None)) is not None:
                yield reference, call

    @property
    def next_deadline(self) -> float:
        return min((call.deadline for call in self._calls.values()), default=math.inf)

    def overdue(self, now: float) -> dict[int, str]:
        """Engine and method of the calls after their deadline, one call per engine."""
        return {call.engine: call.method for call in self._calls.values() if call.deadline <= now}

    def discard(self, engine: int) -> None:
        """Forget the calls to a lost engine."""
        self._calls = {reference: call for reference, call in self._calls.items() if call.engine != engine}

    def clear(self) -> None:
        self._calls.clear()
