"""The scorers as one: finished groups in, scores out.

`queue` decides who scores what, and how often; `failures` when there are too many; the pool passes messages
between them and the actors. There is no background thread: messages are sent and received, and scorers
restarted, only inside `poll` and `finish`.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from megatron_fipo.driver.actor_logs import why_it_died
from megatron_fipo.driver.cluster_loss import ERROR_DELAY_S, check_cluster, is_lost
from megatron_fipo.driver.ray_wait import wait_for_one
from megatron_fipo.driver.scoring.failures import FailureWatch
from megatron_fipo.driver.scoring.queue import ScoringQueue
from megatron_fipo.errors import UserError
from megatron_fipo.scorer.protocol import Failure, FailureKind, ScoreRequest, ScorerSettings
from megatron_fipo.tasks.task import Score

MAX_FAILED_STARTS = 3
"""Starts in a row that one scorer may fail."""


@dataclass(frozen=True, eq=False)
class ScoreResult:
    """The result of a request."""

    request: ScoreRequest
    scores: list[Score] | None
    """In the order of the responses; None if one could not be scored."""


@dataclass
class ScorerCounts:
    """What happened to scorers and groups, those of evaluations included."""

    retries: int = 0
    """Groups sent again, counted each time."""
    restarts: int = 0
    """Scorers started again, for any reason."""
    failures: int = 0
    """Calls of a scorer without scores, whether or not the group was sent again, and starts that failed."""


class ScorerPool:
    """`size` actors of one class (see `protocol.Scorer`), numbered from 0. Single-threaded."""

    def __init__(
        self,
        actor_class: type,
        settings: ScorerSettings,
        size: int,
        *,
        max_failure_share: float,
        log: Callable[[str], None],
    ) -> None:
        """Start the actors; they load while the caller continues. `log` receives failures (`FailureWatch`).

        They take no CPU in Ray's bookkeeping: scoring needs little, and a laptop has no core to spare.
        """
        self._settings = settings
        actors: Any = ray.remote(actor_class)
        self._actor_class = actors.options(num_cpus=0, scheduling_strategy="SPREAD")
        self._queue = ScoringQueue(size, timeout_s=settings.timeout_s, now=time.monotonic())
        self._watch = FailureWatch(max_failure_share, log)
        self._counts = ScorerCounts()
        self._actors: dict[int, Any] = {}
        self._pending: dict[Any, tuple[int, ScoreRequest | None]] = {}
        """Scorer and request of each call without an answer; None for `ready`."""
        self._sent_at: dict[int, float] = {}
        """When each scorer got its last request."""
        self._seconds = 0.0
        self._requests: dict[int, ScoreRequest] = {}
        self._results: list[ScoreResult] = []
        self._refusal: UserError | None = None
        for number in range(size):
            self._start(number)

    @property
    def outstanding(self) -> int:
        """Requests submitted and not yet returned with a result."""
        return len(self._requests) + len(self._results)

    def submit(self, request: ScoreRequest) -> None:
        """Queue a request for the next `poll` to send. No outstanding request may have its key."""
        self._queue.submit(request)
        self._requests[request.key] = request

    def poll(self, timeout_s: float) -> list[ScoreResult]:
        """Do what is due and return new results: as soon as there are any, else after `timeout_s`.

        Raises `UserError` if no scorer can load, or too many groups could not be scored; their results are
        returned by the next call.
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

    def finish(self) -> list[ScoreResult]:
        """Wait for the results of all requests and return them: within the limits of time, without an error.

        If no scorer can load they have none.
        """
        while True:
            if self._refusal is not None:
                self._withdraw()
            if not self._queue.outstanding:
                return self._take_results()
            self._advance(math.inf)

    def abandon(self) -> None:
        """Forget all requests. Waits for those that are being scored, within the limits of time."""
        self._withdraw()
        self.finish()

    def score(
        self, requests: Sequence[ScoreRequest], check: Callable[[], None] = lambda: None
    ) -> list[list[Score] | None]:
        """The scores of all requests, in order; None for one that failed. No other may be outstanding.

        `check` is called at least every second, and may raise. Raises `UserError` as `poll`. After an error
        nothing is outstanding.
        """
        if self.outstanding:
            raise RuntimeError(f"score() was called while {self.outstanding} requests are outstanding")
        scores: dict[int, list[Score] | None] = {}
        try:
            for request in requests:
                self.submit(request)
            while self.outstanding:
                scores |= {result.request.key: result.scores for result in self.poll(1.0)}
                check()
        finally:
            self.abandon()
        return [scores[request.key] for request in requests]

    def take_counts(self) -> ScorerCounts:
        """The counts since the last call."""
        counts, self._counts = self._counts, ScorerCounts()
        return counts

    def take_seconds(self) -> float:
        """Seconds between the requests and the answers since the last call, added up over the scorers."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def shutdown(self) -> None:
        """Kill the scorers."""
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
            self._pending[self._actors[number].score.remote(request)] = number, request
            self._sent_at[number] = time.monotonic()
            self._counts.retries += self._queue.attempts(number) > 1

    def _receive(self, reference: Any, number: int, request: ScoreRequest | None) -> None:
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

    def _answered(
        self, number: int, request: ScoreRequest | None, answer: list[Score] | Failure | None
    ) -> None:
        if request is None:
            self._queue.loaded(number)
            return
        self._seconds += time.monotonic() - self._sent_at[number]
        if not isinstance(answer, Failure):
            self._watch.ended(None)
            self._end(self._queue.ended(number), answer)
        elif answer.kind.repeatable:
            self._failed(answer)
            self._watch.ended(answer)
            self._end(self._queue.ended(number), None)
        else:
            self._replace(number, answer)

    def _lose(self, number: int, kind: FailureKind, what: str) -> None:
        request = self._queue.request_of(number)
        load = "" if request is None else f" with the responses to problem {request.problem.problem_id}"
        self._replace(number, Failure(kind, f"scorer {number} ({self._settings.reward_name}){load} {what}"))

    def _replace(self, number: int, failure: Failure) -> None:
        """End a scorer's process and start another."""
        self._kill(number)
        self._pending = {reference: call for reference, call in self._pending.items() if call[0] != number}
        self._failed(failure)
        key = self._queue.lost(number, time.monotonic())
        if key is not None:
            self._watch.ended(failure)
            self._end(key, None)
        if self._queue.failed_starts(number) < MAX_FAILED_STARTS:
            self._counts.restarts += 1
            self._start(number)
        else:
            self._refusal = UserError(
                f"a scorer could not start {MAX_FAILED_STARTS} times in a row; the last reason: {failure.reason}"
            )

    def _failed(self, failure: Failure) -> None:
        self._counts.failures += 1
        self._watch.happened(failure)

    def _withdraw(self) -> None:
        for key in self._queue.withdraw():
            self._end(key, None)

    def _end(self, key: int, scores: list[Score] | None) -> None:
        self._results.append(ScoreResult(self._requests.pop(key), scores))

    def _take_results(self) -> list[ScoreResult]:
        results, self._results = self._results, []
        return results
