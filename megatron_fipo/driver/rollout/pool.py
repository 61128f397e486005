"""The rollout engines as one: requests in, responses out.

An engine that dies, hangs or sends malformed replies loses only its work.

`fleet` decides which engine may serve, `dispatch` which requests are sent together, `replies` which replies
are valid, `engine_actors` starts processes, `pending_calls` waits for answers, `losses` counts what failed; the pool passes messages
between them. There is no background thread: messages are sent and received, and engines restarted, only
inside `poll`, `loaded`, `abort`, `sleep` and `wake`.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle

from megatron_fipo.config import RolloutConfig
from megatron_fipo.driver.actor_logs import why_it_died
from megatron_fipo.driver.cluster_loss import ERROR_DELAY_S, check_cluster
from megatron_fipo.driver.rollout.dispatch import Call, Dispatcher
from megatron_fipo.driver.rollout.engine_actors import EngineActors
from megatron_fipo.driver.rollout.engine_usage import EngineUsage
from megatron_fipo.driver.rollout.fleet import FAILURES_IN_A_ROW, Fleet, State
from megatron_fipo.driver.rollout.kv_budget import KVBudget
from megatron_fipo.driver.rollout.losses import Losses, PoolCounts
from megatron_fipo.driver.rollout.pending_calls import PendingCall, PendingCalls
from megatron_fipo.driver.rollout.prompt_group import GroupRequest, RequestResult, answer_groups
from megatron_fipo.driver.rollout.replies import malformed, malformed_status
from megatron_fipo.engine.protocol import Generation, GenerationRequest, RolloutEngine, SamplingParams
from megatron_fipo.engine.registry import calls_at_once
from megatron_fipo.errors import UserError

logger = logging.getLogger(__name__)

ABORT_EVERY_S = 0.2
"""Seconds between repeated aborts: one that arrives before the call that it should abort does nothing."""


class EnginePool:
    """`rollout.num_engines` actors of one engine class (see `protocol.RolloutEngine`), numbered from 0.

    Single-threaded. Not suited to a very large number of small calls: each costs the driver about a
    millisecond.
    """

    def __init__(
        self,
        engine_class: type,
        engine_kwargs: dict[str, Any],
        rollout: RolloutConfig,
        *,
        vocab_size: int,
        route_shape: tuple[int, int] | None = None,
        keep_batches: bool,
        loaded_weights_serve: bool = False,
        **placement: Any,
    ) -> None:
        """Reserve resources for the engines and start them; they load while the caller continues.

        `vocab_size`: a reply with a token id outside it is malformed, `route_shape`: and one with routes of other
        (layers, experts per token). `keep_batches`: the requests of one
        `submit` are sent in one call, also on a retry. `loaded_weights_serve`: engines serve the weights that
        they load, as version 0; else none gets a request before its first weights arrive.
        `placement`: where they run, the keywords of `EngineActors`.

        Raises `UserError` if the cluster has no space for them.
        """
        self._rollout = rollout
        self._vocab_size, self._route_shape = vocab_size, route_shape
        engines: Any = engine_class
        self._requests_per_call: int = engines.requests_per_call
        self._dispatcher = Dispatcher(
            requests_per_call=engines.requests_per_call,
            # An engine runs kept batches one after another.
            calls_at_once=1 if keep_batches else calls_at_once(engines, rollout),
            max_retries=rollout.max_retries,
            keep_batches=keep_batches,
        )
        self._fleet = Fleet.of(rollout, 0 if loaded_weights_serve else None, time.monotonic())
        self._budget = KVBudget(rollout.longest_sequence)
        self._pending = PendingCalls()
        self._results: list[RequestResult] = []
        self._losses = Losses(rollout.max_restarts, resumable=not loaded_weights_serve)
        self._aborting = False
        self._actors = EngineActors(
            engine_class,
            engine_kwargs,
            rollout.num_engines,
            calls_at_once=calls_at_once(engines, rollout),
            **placement,
        )
        for number in range(rollout.num_engines):
            self._start(number)

    # -- requests --------------------------------------------------------------------------------------------

    @property
    def outstanding(self) -> int:
        """Requests submitted and not yet returned with a result."""
        return self._dispatcher.outstanding + len(self._results)

    def submit(self, requests: Sequence[GenerationRequest], sampling: SamplingParams) -> None:
        """Queue requests for the next `poll` to send. No outstanding request may have one of their ids."""
        for start in range(0, len(requests), self._requests_per_call):
            self._dispatcher.submit(requests[start : start + self._requests_per_call], sampling)

    def poll(self, timeout_s: float) -> list[RequestResult]:
        """Do what is due and return new results: as soon as there are any, else after `timeout_s`.

        Raises `UserError` if no engine is left, or one can't load or serve for a reason that the user can
        fix.
        """
        until = time.monotonic() + timeout_s
        while True:
            self._advance(0.0 if self._results else until)
            self._losses.raise_failure(self._fleet)
            if self._results or time.monotonic() >= until:
                self._dispatch()
                return self._take_results()

    def abort(self) -> list[RequestResult]:
        """Stop all requests and return their results; unfinished ones have reason `abort` and tokens so far.

        An engine that does not return its calls within `health_timeout_s` counts as hung, and the tokens of
        these calls are lost.
        """
        timeout_s = self._rollout.health_timeout_s
        self._aborting = True
        until, abort_at = time.monotonic() + timeout_s, 0.0
        self._withdraw()
        while self._dispatcher.outstanding or self._pending.engines(RolloutEngine.abort.__name__):
            if (now := time.monotonic()) >= abort_at:
                abort_at = now + ABORT_EVERY_S
                for number in self._dispatcher.busy:
                    self._send(number, RolloutEngine.abort)
            self._advance(abort_at)
            if time.monotonic() >= until:
                for number in {*self._dispatcher.busy, *self._pending.engines(RolloutEngine.abort.__name__)}:
                    self._lose(
                        number, f"did not stop within rollout.health_timeout_s = {timeout_s:g} s", "hangs"
                    )
            self._withdraw()
        self._aborting = False
        return self._take_results()

    def generate(self, groups: Sequence[GroupRequest]) -> list[Generation | None]:
        """Answer the requests of all groups, in order; None for one that failed permanently.

        For engines that serve the weights they load. No other request may be outstanding.
        """
        if self.outstanding:
            raise RuntimeError(f"generate() was called while {self.outstanding} requests are outstanding")
        self.loaded(wait=True)
        return answer_groups(self, groups, 1.0)

    # -- engines ---------------------------------------------------------------------------------------------

    def loaded(self, wait: bool) -> dict[int, ActorHandle]:
        """The living engines whose model is loaded, by number; for a weight push.

        With `wait`, first wait for those that are starting, and for an answer of the others to a probe.
        Raises `UserError` as `poll`.
        """
        while wait:
            self._advance_while(lambda: self._fleet.numbers(State.STARTING))
            self._fleet.probe_all()
            self._advance(0.0)
            self._advance_while(lambda: self._fleet.probing)
            wait = bool(self._fleet.numbers(State.STARTING))
        self._losses.raise_failure(self._fleet)
        return self._handles(State.STALE, State.SERVING, State.SUSPECT)

    @property
    def starting(self) -> bool:
        """Whether an engine is starting and has not loaded yet, as of the last `poll`."""
        return bool(self._fleet.numbers(State.STARTING))

    def stale(self) -> dict[int, ActorHandle]:
        """Loaded engines without the current weights, such as restarted ones: no requests until `updated`."""
        return self._handles(State.STALE)

    def updated(self, numbers: Iterable[int], version: int) -> None:
        """These engines now have weights of the current `version`: they serve, and all others are stale."""
        self._fleet.updated(numbers, version)

    def failed(self, number: int, reason: str) -> None:
        """End an engine that did not accept its weights, log why, and restart it if `max_restarts` allows."""
        if self._fleet.state(number) not in (State.STARTING, State.RETIRED):
            self._lose(number, reason, "deaths")

    def take_counts(self) -> PoolCounts:
        """What happened since the last call."""
        counts = self._losses.take_counts()
        counts.retries, self._dispatcher.retries = self._dispatcher.retries, 0
        return counts

    def take_usage(self) -> list[EngineUsage]:
        """What each engine did since the last call."""
        return self._fleet.take_usage(time.monotonic())

    def sleep(self) -> None:
        """Make the engines free their device memory, with no request outstanding; they are stale after `wake`."""
        self.loaded(wait=True)
        self._call_all(RolloutEngine.sleep)
        self._fleet.forgot_weights()

    def wake(self) -> None:
        """Make the engines allocate their device memory again."""
        self._call_all(RolloutEngine.wake)

    def shutdown(self) -> None:
        """Kill the engines and release their resources."""
        self._pending.clear()
        self._actors.shutdown()

    def _handles(self, *states: State) -> dict[int, ActorHandle]:
        return {number: self._actors[number] for number in self._fleet.numbers(*states)}

    def _start(self, number: int) -> None:
        self._actors.start(number)
        self._send(number, RolloutEngine.ready)

    def _call_all(self, method: Callable[..., Any]) -> None:
        for number in self._fleet.numbers(State.STALE, State.SERVING, State.SUSPECT):
            self._send(number, method, in_time=True)
        self._advance_while(lambda: self._pending.engines(method.__name__))

    # -- one step --------------------------------------------------------------------------------------------

    def _advance(self, until: float) -> None:
        """Send what is due, wait for an answer or a deadline up to `until`, and process all answers."""
        now = time.monotonic()
        for number in self._fleet.probes_due(now):
            self._send(number, RolloutEngine.status)
        self._dispatch()
        wake_at = min(until, self._fleet.next_event(), self._pending.next_deadline)
        for reference, pending in self._pending.answered(max(0.0, wake_at - now)):
            self._receive(reference, pending)
        now = time.monotonic()
        for number, reason in self._fleet.overdue(now):
            self._lose(number, reason, "hangs")
        for number, method in self._pending.overdue(now).items():
            self._lose(
                number,
                f"did not answer {method}() within rollout.timeout_s = {self._rollout.timeout_s:g} s",
                "hangs",
            )

    def _advance_while(self, unfinished: Callable[[], list[int]]) -> None:
        while unfinished():
            self._advance(math.inf)
            self._losses.raise_failure(self._fleet)

    def _dispatch(self) -> None:
        if self._aborting or not self._dispatcher.waiting:
            return
        space = {
            number: self._budget.space(
                self._fleet.status(number),
                min(self._fleet.unfinished(number), self._dispatcher.requests_at(number)),
            )
            for number in self._fleet.numbers(State.SERVING)
        }
        for call in self._dispatcher.start_calls(space):
            self._fleet.called(call.engine, len(call.items), time.monotonic())
            self._send(call.engine, RolloutEngine.generate, call.requests, call.sampling, call=call)

    def _send(
        self,
        number: int,
        method: Callable[..., Any],
        *arguments: Any,
        in_time: bool = False,
        call: Call | None = None,
    ) -> None:
        """Call a method of an engine, given as `RolloutEngine` declares it.

        With `in_time`, an engine that does not answer within `timeout_s` is lost.
        """
        deadline = time.monotonic() + self._rollout.timeout_s if in_time else math.inf
        name = method.__name__
        reference = getattr(self._actors[number], name).remote(*arguments)
        self._pending.add(reference, PendingCall(number, name, deadline, call, self._fleet.version))

    def _receive(self, reference: Any, pending: PendingCall) -> None:
        try:
            answer = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            self._raised(pending, error.cause)
        except ray.exceptions.RayError as error:
            check_cluster(ERROR_DELAY_S)
            self._lose(pending.engine, f"died: {why_it_died(error)}", "deaths")
        else:
            reports = pending.method in (RolloutEngine.ready.__name__, RolloutEngine.status.__name__)
            if reports and (problem := malformed_status(answer)) is not None:
                self._lose(pending.engine, f"answered {pending.method}() with {problem}", "malformed")
            elif pending.method == RolloutEngine.ready.__name__:
                self._fleet.loaded(pending.engine, answer, time.monotonic())
                self._losses.loaded = True
            elif pending.method == RolloutEngine.status.__name__:
                self._fleet.answered_probe(pending.engine, answer, time.monotonic())
            elif pending.call is not None:
                self._replied(pending.call, answer, pending.version)

    def _replied(self, call: Call, reply: Any, version: int | None) -> None:
        """Process an answer to `generate`, valid or not."""
        problem = malformed(
            reply, call.requests, call.sampling, self._vocab_size, self._aborting, self._route_shape
        )
        if problem is not None:
            self._losses.counts.malformed += 1
            self._call_failed(call, f"gave a malformed reply: {problem}")
            return
        others = {generation.weight_version for generation in reply} - {version}
        if others:
            self._losses.counts.malformed += 1
            self._lose(call.engine, f"answered with weight version {others.pop()}, not {version}")
            return
        self._dispatcher.answered(call)
        for request, generation in zip(call.requests, reply, strict=True):
            self._results.append(RequestResult(request.request_id, generation))
            if generation.finish_reason != "abort":
                self._budget.finished(
                    len(request.prompt_ids), len(request.prefix) + len(generation.response_ids)
                )
        self._fleet.answered_call(call.engine, len(reply), time.monotonic())

    def _raised(self, pending: PendingCall, error: Exception) -> None:
        """An engine's method raised.

        The next `poll` raises a `UserError` of the first load or of a `generate` to the caller.
        """
        if pending.call is not None:
            if isinstance(error, UserError):
                self._losses.refusal = error
                self._give_back(pending.call)
            else:
                self._call_failed(pending.call, f"failed: {error!r}")
        elif isinstance(error, UserError) and pending.method == RolloutEngine.ready.__name__:
            if self._fleet.restarts(pending.engine) == 0 or not self._losses.loaded:
                self._losses.refusal = error
            else:
                self._lose(pending.engine, f"cannot load its model again: {error}", "deaths")
        else:
            self._lose(pending.engine, f"failed in {pending.method}(): {error!r}", "deaths")

    def _call_failed(self, call: Call, reason: str) -> None:
        logger.warning("rollout engine %d %s (%d requests)", call.engine, reason, len(call.items))
        self._give_back(call)
        if self._fleet.failed_call(call.engine, time.monotonic()):
            self._lose(call.engine, f"failed {FAILURES_IN_A_ROW} calls in a row")

    def _give_back(self, call: Call) -> None:
        self._results += [RequestResult(request_id, None) for request_id in self._dispatcher.failed(call)]

    def _lose(self, number: int, reason: str, count: str | None = None) -> None:
        """End an engine, send its requests again, and restart or retire it."""
        self._actors.kill(number)
        self._pending.discard(number)
        for call in self._dispatcher.at(number):
            self._give_back(call)
        again = self._fleet.lost(number, time.monotonic())
        self._losses.lost(self._fleet, number, reason, count)
        if again:
            self._start(number)

    def _withdraw(self) -> None:
        """Return the waiting requests as aborted before they began."""
        empty = Generation.not_started(self._fleet.version or 0)
        self._results += [RequestResult(request_id, empty) for request_id in self._dispatcher.withdraw()]

    def _take_results(self) -> list[RequestResult]:
        results, self._results = self._results, []
        return results
