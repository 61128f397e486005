"""Engines as Ray actors, and one round of requests spread over them; an engine that dies or hangs costs its work, not the run."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from megatron_fipo.errors import UserError
from megatron_fipo.rollout.dispatch import Dispatcher, NoEngineLeftError
from megatron_fipo.rollout.protocol import RAY_LOGS, Generation, GenerationRequest, SamplingParams

logger = logging.getLogger(__name__)

PLACEMENT_TIMEOUT_S = 60.0
PING_TIMEOUT_S = 60.0


class StaleWeightsError(RuntimeError):
    """An engine answered with other weights than the round was meant for: the weight sync is broken."""


@dataclass(frozen=True)
class RoundResult:
    """`generations[i]` answers request `i`; None where it failed `max_retries + 1` times."""

    generations: list[list[Generation] | None]
    retries: int
    """Requests sent again, counted each time."""


@dataclass(frozen=True)
class _Call:
    engine: int
    requests: list[int]
    deadline: float


class EnginePool:
    """`num_engines` actors of one engine class (see `protocol.RolloutEngine`), known by their numbers from 0.

    A dead or hanging engine is said once in the log, killed, and gone; the others take over its requests.
    """

    def __init__(
        self,
        engine_class: type,
        engine_kwargs: dict[str, Any],
        num_engines: int,
        *,
        max_retries: int,
        timeout_s: float,
        gpus_per_engine: int = 0,
    ) -> None:
        """Start the engines (1 CPU and `gpus_per_engine` GPUs each) and wait until all have loaded their model.

        Raises `UserError` where Ray has no room for them or an engine can't load; nothing is left running then.
        """
        self._max_retries = max_retries
        self._timeout_s = timeout_s
        bundle = {"CPU": 1, "GPU": gpus_per_engine} if gpus_per_engine else {"CPU": 1}
        self._placement = placement_group([bundle] * num_engines, strategy="PACK")
        self._engines: dict[int, Any] = {}
        try:
            self._start(engine_class, engine_kwargs, num_engines, bundle)
        except BaseException:
            self.shutdown()
            raise

    def _start(self, engine_class: type, engine_kwargs: dict[str, Any], num_engines: int, bundle: dict[str, int]) -> None:
        try:
            ray.get(self._placement.ready(), timeout=PLACEMENT_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError:
            raise UserError(
                f"Ray found no room for {num_engines} rollout engines ({bundle} each) within {PLACEMENT_TIMEOUT_S:g} s; "
                "lower rollout.num_engines or add nodes"
            ) from None
        actor_class: Any = ray.remote(engine_class)
        for number in range(num_engines):
            strategy = PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=number)
            options = actor_class.options(num_cpus=1, num_gpus=bundle.get("GPU", 0), scheduling_strategy=strategy)
            self._engines[number] = options.remote(**engine_kwargs)
        try:
            ray.get([engine.ready.remote() for engine in self._engines.values()], timeout=self._timeout_s)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise
        except ray.exceptions.GetTimeoutError:
            raise UserError(
                f"the rollout engines did not load within {self._timeout_s:g} s; raise rollout.timeout_s or see {RAY_LOGS}"
            ) from None

    @property
    def engines(self) -> dict[int, Any]:
        """The engines still alive as far as known, by number: what `weight_sync.push_weights` takes."""
        return dict(self._engines)

    def check(self) -> dict[int, Any]:
        """Ping every engine, retire those that don't answer, return the others. For between rounds, e.g. before a push.

        Raises `UserError` when none is left.
        """
        pings = {number: engine.ready.remote() for number, engine in self._engines.items()}
        deadline = time.monotonic() + PING_TIMEOUT_S
        for number, ping in pings.items():
            try:
                ray.get(ping, timeout=max(0.0, deadline - time.monotonic()))
            except ray.exceptions.RayError as error:
                self.retire(number, _reason(error, PING_TIMEOUT_S))
        if not self._engines:
            raise _no_engine_left()
        return self.engines

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: SamplingParams,
        version: int,
        on_finished: Callable[[int], None] | None = None,
    ) -> RoundResult:
        """One round: every request answered by weights of `version`, or None after `max_retries` more attempts.

        `on_finished` is told how many requests have been settled so far. A call that raises, dies or exceeds `timeout_s`
        has failed. Raises `UserError` where no engine can serve a request or none is left, and `StaleWeightsError`.
        """
        dispatcher = Dispatcher([request.n for request in requests], list(self._engines), self._max_retries)
        generations: list[list[Generation] | None] = [None] * len(requests)
        calls: dict[Any, _Call] = {}
        while not dispatcher.done:
            try:
                started = dispatcher.assignments()
            except NoEngineLeftError:
                raise _no_engine_left() from None
            for engine, chunk in started:
                reference = self._engines[engine].generate.remote([requests[i] for i in chunk], sampling)
                calls[reference] = _Call(engine, chunk, time.monotonic() + self._timeout_s)
            for reference in _ready_or_overdue(calls):
                call = calls.pop(reference)
                reply = self._reply(reference, call, [requests[i] for i in call.requests], version)
                if reply is None:
                    dispatcher.failed(call.engine, lost=call.engine not in self._engines)
                    continue
                dispatcher.succeeded(call.engine)
                for index, answer in zip(call.requests, reply, strict=True):
                    generations[index] = answer
            if on_finished is not None:
                on_finished(len(dispatcher.finished) + len(dispatcher.dropped))
        return RoundResult(generations, dispatcher.retries)

    def _reply(
        self, reference: Any, call: _Call, requests: Sequence[GenerationRequest], version: int
    ) -> list[list[Generation]] | None:
        """What a finished or overdue call brought; None where it failed, after saying why and retiring a lost engine."""
        try:
            reply = ray.get(reference, timeout=0)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            logger.warning("rollout engine %d failed on %d requests: %r", call.engine, len(requests), error.cause)
            return None
        except ray.exceptions.RayError as error:
            self.retire(call.engine, _reason(error, self._timeout_s))
            return None
        problem = malformed(reply, requests)
        if problem is not None:
            logger.warning("rollout engine %d gave a malformed reply: %s", call.engine, problem)
            return None
        for other in {generation.weight_version for answer in reply for generation in answer} - {version}:
            raise StaleWeightsError(f"rollout engine {call.engine} answered with weight version {other}, not {version}")
        return reply

    def retire(self, number: int, reason: str) -> None:
        """Kill an engine that is no use any more, say so once, and go on without it."""
        engine = self._engines.pop(number)
        ray.kill(engine)
        logger.warning("rollout engine %d %s; %d left", number, reason, len(self._engines))

    def shutdown(self) -> None:
        """Kill the engines and give their place back."""
        for engine in self._engines.values():
            ray.kill(engine)
        self._engines.clear()
        remove_placement_group(self._placement)


def malformed(reply: Any, requests: Sequence[GenerationRequest]) -> str | None:
    """What is wrong with the form of an engine's reply, or None: `n` non-empty responses per request, one log-prob per token."""
    if not isinstance(reply, list) or len(reply) != len(requests):
        return f"{len(requests)} lists of responses were due"
    for request, answer in zip(requests, reply, strict=True):
        if len(answer) != request.n:
            return f"request {request.request_id} has {len(answer)} responses instead of {request.n}"
        for generation in answer:
            if not generation.response_ids or len(generation.response_ids) != len(generation.log_probs):
                return f"request {request.request_id} has a response without one log-probability per token"
    return None


def _ready_or_overdue(calls: dict[Any, _Call]) -> list[Any]:
    """Wait until a call has finished or passed its deadline; return all such calls (at least one)."""
    while True:
        first_deadline = min(call.deadline for call in calls.values())
        ray.wait(list(calls), num_returns=1, timeout=max(0.0, first_deadline - time.monotonic()))
        finished, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
        now = time.monotonic()
        settled = [ref for ref, call in calls.items() if ref in finished or call.deadline <= now]
        if settled:
            return settled


def _reason(error: Exception, timeout_s: float) -> str:
    if isinstance(error, ray.exceptions.GetTimeoutError):
        return f"gave no answer within {timeout_s:g} s and is killed"
    return f"died ({type(error).__name__})"


def _no_engine_left() -> UserError:
    return UserError(f"no rollout engine is left: all have died or hung; see {RAY_LOGS}, then run the same command to resume")
