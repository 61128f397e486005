"""A pool of actors that run the user's code: requests in, answers or failures out.

`queue` decides who answers what, and how often; `failures` when there are too many; the pool passes messages
between them and the actors. There is no background thread: messages are sent and received, and workers
restarted, only inside `poll` and `finish`.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import ray

from megatron_fipo.driver.actor_logs import why_it_died
from megatron_fipo.driver.cluster_loss import ERROR_DELAY_S, check_cluster, is_lost
from megatron_fipo.driver.ray_wait import wait_for_one
from megatron_fipo.driver.workers.failures import FailureWatch
from megatron_fipo.driver.workers.queue import AnyRequest, WorkQueue
from megatron_fipo.errors import UserError
from megatron_fipo.scorer.protocol import Failure, FailureKind

MAX_FAILED_STARTS = 3
"""Starts in a row that one worker may fail."""


@dataclass
class WorkerCounts:
    """What happened to workers and requests, those of evaluations included."""

    retries: int = 0
    """Requests sent again, counted each time."""
    restarts: int = 0
    """Workers started again, for any reason."""
    failures: int = 0
    """Failures of the user's code, whether or not its request was sent again, and starts that failed."""


AnyAnswer = TypeVar("AnyAnswer")
AnyResult = TypeVar("AnyResult")
AnyCounts = TypeVar("AnyCounts", bound=WorkerCounts)


class WorkerPool(Generic[AnyRequest, AnyAnswer, AnyResult, AnyCounts]):
    """`size` actors of one class, numbered from 0. Single-threaded."""

    noun: ClassVar[str]
    """What a worker is, for messages."""
    method: ClassVar[str]
    """Of an actor: takes a request, and returns an answer or a `Failure`. `ready` returns once it has loaded."""
    counts: Callable[[], AnyCounts]
    result: Callable[[AnyRequest, AnyAnswer | None], AnyResult]
    """Of a request and its answer, None if it has none."""

    def __init__(
        self, actor_class: type, settings: Any, size: int, *, timeout_s: float, watch: FailureWatch
    ) -> None:
        """Start the actors with `settings`; they load while the caller continues. `timeout_s` limits each call of the
        user's code.

        They take no CPU in Ray's bookkeeping: they need little, and a laptop has no core to spare.
        """
        self._settings = settings
        actors: Any = ray.remote(actor_class)
        self._actor_class = actors.options(num_cpus=0, scheduling_strategy="SPREAD")
        self._queue: WorkQueue[AnyRequest] = WorkQueue(size, timeout_s=timeout_s, now=time.monotonic())
        self._watch = watch
        self._counts = self.counts()
        self._actors: dict[int, Any] = {}
        self._pending: dict[Any, tuple[int, AnyRequest | None]] = {}
        """Worker and request of each call without an answer; None for `ready`."""
        self._sent_at: dict[int, float] = {}
        """When each worker got its last request."""
        self._seconds = 0.0
        self._requests: dict[int, AnyRequest] = {}
        self._results: list[AnyResult] = []
        self._refusal: UserError | None = None
        for number in range(size):
            self._start(number)

    def failures(self, answer: AnyAnswer) -> Sequence[Failure | None]:
        """For each part of an answer that counts alone: why it has no result, or None."""
        return [None]

    @property
    def outstanding(self) -> int:
        """Requests submitted and not yet returned with a result."""
        return len(self._requests) + len(self._results)

    def wait_until_loaded(self) -> None:
        """Wait for all workers. Raises `UserError` if one cannot load."""
        while any(request is None for _, request in self._pending.values()):
            self._advance(math.inf)
            if self._refusal is not None:
                raise self._refusal

    def submit(self, request: AnyRequest) -> None:
        """Queue a request for the next `poll` to send. No outstanding request may have its key."""
        self._queue.submit(request)
        self._requests[request.key] = request

    def poll(self, timeout_s: float) -> list[AnyResult]:
        """Do what is due and return new results: as soon as there are any, else after `timeout_s`.

        Raises `UserError` if no worker can load, or too many requests failed; their results are returned by the next call.
        """
        until = time.monotonic() + timeout_s
        while True:
            if self._refusal is not None:
                raise self._refusal
            self._advance(0.0 if self._results else until)
            self._watch.raise_if_too_many()
            if self._results or time.monotonic() >= until:
                self._dispatch()
                return self._take_results()

    def finish(self) -> list[AnyResult]:
        """Wait for the results of all requests and return them: within the limits of time, without an error.

        If no worker can load they have none.
        """
        while True:
            if self._refusal is not None:
                self._withdraw()
            if not self._queue.outstanding:
                return self._take_results()
            self._advance(math.inf)

    def abandon(self) -> None:
        """Forget all requests. Waits for those that are being answered, within the limits of time."""
        self._withdraw()
        self.finish()

    def take_counts(self) -> AnyCounts:
        """The counts since the last call."""
        counts, self._counts = self._counts, self.counts()
        return counts

    def take_seconds(self) -> float:
        """Seconds between the requests and the answers since the last call, added up over the workers."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def shutdown(self) -> None:
        """Kill the workers."""
        self._pending.clear()
        if is_lost():
            return
        for number in list(self._actors):
            self._kill(number)

    # -- actors ----------------------------------------------------------------------------------------------

    def _start(self, number: int) -> None:
        actor = self._actors[number] = self._actor_class.remote(self._settings)
        self._pending[actor.ready.remote()] = number, None

    def _kill(self, number: int) -> None:
        if number in self._actors:
            ray.kill(self._actors.pop(number))

    # -- one step --------------------------------------------------------------------------------------------

    def _advance(self, until: float) -> None:
        """Send what is due, wait for an answer or a deadline up to `until`, and process all answers."""
        self._dispatch()
        wait_s = max(0.0, min(until, self._queue.next_deadline) - time.monotonic())
        if not self._pending:
            time.sleep(wait_s)
            return
        wait_for_one(list(self._pending), wait_s)
        for reference in ray.wait(list(self._pending), num_returns=len(self._pending), timeout=0)[0]:
            self._receive(reference, *self._pending.pop(reference))
        for number in self._queue.overdue(time.monotonic()):
            self._lose(number, FailureKind.HUNG, "did not answer in time")

    def _dispatch(self) -> None:
        for number, request in self._queue.start_calls(time.monotonic()):
            self._pending[getattr(self._actors[number], self.method).remote(request)] = number, request
            self._sent_at[number] = time.monotonic()
            self._counts.retries += self._queue.attempts(number) > 1

    def _receive(self, reference: Any, number: int, request: AnyRequest | None) -> None:
        try:
            answer = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if request is None and isinstance(error.cause, UserError):
                self._refusal = error.cause
            else:
                self._lose(number, FailureKind.DIED, f"failed: {error.cause!r}")
        except ray.exceptions.RayError as error:
            check_cluster(ERROR_DELAY_S)
            self._lose(number, FailureKind.DIED, f"died: {why_it_died(error)}")
        else:
            self._answered(number, request, answer)

    def _answered(self, number: int, request: AnyRequest | None, answer: AnyAnswer | Failure | None) -> None:
        if request is None:
            self._queue.loaded(number)
            return
        self._seconds += time.monotonic() - self._sent_at[number]
        if isinstance(answer, Failure) and not answer.kind.repeatable:
            self._replace(number, answer)
            return
        result = None if isinstance(answer, Failure) else answer
        for failure in [answer] if isinstance(answer, Failure) else self.failures(answer):  # type: ignore[arg-type]
            if failure is not None:
                self._failed(failure)
            self._watch.ended(failure)
        self._end(self._queue.ended(number), result)

    def _lose(self, number: int, kind: FailureKind, what: str) -> None:
        request = self._queue.request_of(number)
        load = "" if request is None else str(request)
        self._replace(number, Failure(kind, f"{self.noun} {number}{load} {what}"))

    def _replace(self, number: int, failure: Failure) -> None:
        """End a worker's process and start another."""
        self._kill(number)
        self._pending = {reference: call for reference, call in self._pending.items() if call[0] != number}
        self._failed(failure)
        key = self._queue.lost(number, time.monotonic())
        if key is not None:
            self._given_up(key, failure)
        if self._queue.failed_starts(number) < MAX_FAILED_STARTS:
            self._counts.restarts += 1
            self._start(number)
        else:
            self._refusal = UserError(
                f"a {self.noun} could not start {MAX_FAILED_STARTS} times in a row; the last reason: {failure.reason}"
            )

    def _failed(self, failure: Failure) -> None:
        self._counts.failures += 1
        self._watch.happened(failure)

    def _given_up(self, key: int, failure: Failure) -> None:
        """The request's last call lost its worker."""
        self._watch.ended(failure)
        self._end(key, None)

    def _withdraw(self) -> None:
        for key in self._queue.withdraw():
            self._end(key, None)

    def _end(self, key: int, answer: AnyAnswer | None) -> None:
        self._results.append(type(self).result(self._requests.pop(key), answer))

    def _take_results(self) -> list[AnyResult]:
        results, self._results = self._results, []
        return results
