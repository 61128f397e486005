"""The rollout engines as one: requests in, responses out. An engine that dies, hangs or answers garbage costs its work, not the run.

`fleet` decides which engine may serve, `dispatch` which requests travel together, `replies` what may be believed, `actors`
starts processes; the pool carries messages between them. Nothing happens behind the driver's back: only inside `poll`, `loaded`,
`abort`, `sleep` and `wake` is anything sent, received, or started again.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup

from megatron_fipo.config import RolloutConfig
from megatron_fipo.driver.rollout.dispatch import Call, Dispatcher
from megatron_fipo.driver.rollout.engine_actors import EngineActors
from megatron_fipo.driver.rollout.fleet import FAILURES_IN_A_ROW, Fleet, State
from megatron_fipo.driver.rollout.replies import malformed
from megatron_fipo.engine.protocol import RAY_LOGS, Generation, GenerationRequest, SamplingParams
from megatron_fipo.errors import UserError

logger = logging.getLogger(__name__)

ABORT_EVERY_S = 0.2
"""Seconds between repeated aborts: one that overtakes a call that has not begun yet does nothing."""


@dataclass(frozen=True)
class Settled:
    """The end of a request."""

    request_id: str
    generation: Generation | None
    """None: failed `max_retries + 1` times; never to be scored."""


@dataclass
class PoolCounts:
    """What happened to engines and requests."""

    retries: int = 0
    """Requests sent again, counted each time."""
    restarts: int = 0
    """Engines started again, for whatever reason."""
    deaths: int = 0
    """Engines whose process ended."""
    hangs: int = 0
    """Engines that left a call, a health probe or an abort unanswered."""
    malformed: int = 0
    """Replies that were not believed."""


@dataclass(frozen=True)
class _Question:
    """A message to an engine whose answer is awaited."""

    engine: int
    method: str
    deadline: float = math.inf
    call: Call | None = None
    version: int | None = None
    """Of the weights that a `generate` was meant for."""


class EnginePool:
    """`rollout.num_engines` actors of one engine class (see `protocol.RolloutEngine`), known by their numbers from 0.

    Single-threaded. Not made for a huge number of small calls: each costs the driver about a millisecond.
    """

    def __init__(
        self,
        engine_class: type,
        engine_kwargs: dict[str, Any],
        rollout: RolloutConfig,
        *,
        gpus_per_engine: int,
        keep_batches: bool,
        loaded_weights_serve: bool = False,
        trainer_placement: PlacementGroup | None = None,
    ) -> None:
        """Find room for the engines and start them; they load while the caller goes on.

        `keep_batches`: the requests of one `submit` travel in one call, also when sent again. `loaded_weights_serve`: engines
        serve what they load, as version 0; else none gets a request before its first weights arrive. `trainer_placement` puts
        them beside the trainer's ranks (`EngineActors`). Raises `UserError` where there is no room.
        """
        self._rollout = rollout
        engines: Any = engine_class
        self._requests_per_call: int = engines.requests_per_call
        self._dispatcher = Dispatcher(
            requests_per_call=engines.requests_per_call,
            # An engine takes batches that have to stay as they are one after the other; a queue there would use up their deadlines.
            calls_at_once=1 if keep_batches else engines.calls_at_once,
            max_retries=rollout.max_retries,
            keep_batches=keep_batches,
        )
        self._fleet = Fleet(
            rollout.num_engines,
            max_restarts=rollout.max_restarts,
            load_timeout_s=rollout.timeout_s,
            health_timeout_s=rollout.health_timeout_s,
            loaded_version=0 if loaded_weights_serve else None,
            now=time.monotonic(),
        )
        self._questions: dict[Any, _Question] = {}
        self._settled: list[Settled] = []
        self._counts = PoolCounts()
        self._aborting = False
        self._refusal: UserError | None = None
        self._last_loss = ""
        self._actors = EngineActors(
            engine_class,
            engine_kwargs,
            rollout.num_engines,
            gpus_per_engine=gpus_per_engine,
            trainer_placement=trainer_placement,
        )
        for number in range(rollout.num_engines):
            self._start(number)

    # -- requests -----------------------------------------------------------------------------------------------------

    @property
    def outstanding(self) -> int:
        """Requests submitted and not yet returned as settled."""
        return self._dispatcher.outstanding + len(self._settled)

    def submit(self, requests: Sequence[GenerationRequest], sampling: SamplingParams) -> None:
        """Queue requests, whose ids no outstanding request may have; they are sent by the next `poll`."""
        for start in range(0, len(requests), self._requests_per_call):
            self._dispatcher.submit(requests[start : start + self._requests_per_call], sampling)

    def poll(self, timeout_s: float) -> list[Settled]:
        """Do what is due and return what was settled: as something is, else after `timeout_s`.

        Raises `UserError` where no engine is left, or one can't load or serve for a reason that the user can mend.
        """
        until = time.monotonic() + timeout_s
        while True:
            self._advance(0.0 if self._settled else until)
            self._raise_trouble()
            if self._settled or time.monotonic() >= until:
                self._dispatch()
                return self._take_settled()

    def abort(self) -> list[Settled]:
        """Stop everything; each outstanding request comes back, unfinished ones with finish reason `abort` and what they have.

        An engine that does not return its calls within `health_timeout_s` counts as hung, and what it was working on is lost.
        """
        timeout_s = self._rollout.health_timeout_s
        self._aborting = True
        until, ask_at = time.monotonic() + timeout_s, 0.0
        self._withdraw()
        while self._dispatcher.outstanding or self._awaiting("abort"):
            if (now := time.monotonic()) >= ask_at:
                ask_at = now + ABORT_EVERY_S
                for number in self._dispatcher.busy:
                    self._ask(number, "abort")
            self._advance(ask_at)
            if time.monotonic() >= until:
                for number in {*self._dispatcher.busy, *self._awaiting("abort")}:
                    self._lose(
                        number, f"did not stop within rollout.health_timeout_s = {timeout_s:g} s", "hangs"
                    )
            self._withdraw()
        self._aborting = False
        return self._take_settled()

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: SamplingParams,
        on_finished: Callable[[int], None] | None = None,
    ) -> list[Generation | None]:
        """Answer all requests, in order; None where one failed for good. For engines that serve what they load.

        `on_finished` is told, at least every second, how many are settled. Nothing else may be outstanding.
        """
        if self.outstanding:
            raise RuntimeError(f"generate() was called while {self.outstanding} requests are outstanding")
        self.loaded(wait=True)
        self.submit(requests, sampling)
        answers: dict[str, Generation | None] = {}
        while self.outstanding:
            answers |= {settled.request_id: settled.generation for settled in self.poll(1.0)}
            if on_finished is not None:
                on_finished(len(answers))
        return [answers[request.request_id] for request in requests]

    # -- engines ------------------------------------------------------------------------------------------------------

    def loaded(self, wait: bool) -> dict[int, ActorHandle]:
        """The living engines whose model is loaded, by number; for a weight push.

        With `wait`, first wait for those being started, and make sure that the others answer. Raises `UserError` as `poll` does.
        """
        while wait:
            self._advance_while(lambda: self._fleet.numbers(State.STARTING))
            self._fleet.probe_all()
            self._advance(0.0)
            self._advance_while(lambda: self._fleet.probing)
            wait = bool(self._fleet.numbers(State.STARTING))
        self._raise_trouble()
        return self._handles(State.STALE, State.SERVING, State.SUSPECT)

    @property
    def starting(self) -> bool:
        """Whether an engine is being started and has not loaded yet. Known as of the last `poll`."""
        return bool(self._fleet.numbers(State.STARTING))

    def stale(self) -> dict[int, ActorHandle]:
        """Loaded engines without the current weights, such as those started again; they get no requests until `updated`."""
        return self._handles(State.STALE)

    def updated(self, numbers: Iterable[int], version: int) -> None:
        """These engines hold `version` now, which is current; they serve, and all others are stale."""
        self._fleet.updated(numbers, version)

    def failed(self, number: int, reason: str) -> None:
        """End an engine that did not take its weights, say why, and start it again while `max_restarts` allows."""
        if self._fleet.state(number) not in (State.STARTING, State.RETIRED):
            self._lose(number, reason, "deaths")

    def take_counts(self) -> PoolCounts:
        """What happened since the last call."""
        counts, self._counts = self._counts, PoolCounts()
        counts.retries, self._dispatcher.retries = self._dispatcher.retries, 0
        return counts

    def sleep(self) -> None:
        """Let the engines give their device memory back. Nothing may be outstanding; they are stale when they `wake`."""
        self.loaded(wait=True)
        self._tell_all("sleep")
        self._fleet.forgot_weights()

    def wake(self) -> None:
        self._tell_all("wake")

    def shutdown(self) -> None:
        """Kill the engines and give their place back."""
        self._questions.clear()
        self._actors.shutdown()

    def _handles(self, *states: State) -> dict[int, ActorHandle]:
        return {number: self._actors[number] for number in self._fleet.numbers(*states)}

    def _start(self, number: int) -> None:
        self._actors.start(number)
        self._ask(number, "ready")

    def _tell_all(self, method: str) -> None:
        for number in self._fleet.numbers(State.STALE, State.SERVING, State.SUSPECT):
            self._ask(number, method, in_time=True)
        self._advance_while(lambda: self._awaiting(method))

    # -- one step -----------------------------------------------------------------------------------------------------

    def _advance(self, until: float) -> None:
        """Send what is due, wait for an answer or a deadline but not beyond `until`, and deal with all that has come."""
        now = time.monotonic()
        for number in self._fleet.probes_due(now):
            self._ask(number, "ping")
        self._dispatch()
        wake_at = min(
            until,
            self._fleet.next_event(),
            *(question.deadline for question in self._questions.values()),
            math.inf,
        )
        for reference in _answered(list(self._questions), max(0.0, wake_at - now)):
            # An answer may belong to an engine that was lost through the answer before it.
            if (question := self._questions.pop(reference, None)) is not None:
                self._receive(reference, question)
        now = time.monotonic()
        for number, reason in self._fleet.overdue(now):
            self._lose(number, reason, "hangs")
        late = {
            question.engine: question.method
            for question in self._questions.values()
            if question.deadline <= now
        }
        for number, method in late.items():
            self._lose(
                number,
                f"did not answer {method}() within rollout.timeout_s = {self._rollout.timeout_s:g} s",
                "hangs",
            )

    def _advance_while(self, unfinished: Callable[[], list[int]]) -> None:
        while unfinished():
            self._advance(math.inf)
            self._raise_trouble()

    def _dispatch(self) -> None:
        if self._aborting:
            return
        for call in self._dispatcher.start_calls(self._fleet.numbers(State.SERVING)):
            self._ask(call.engine, "generate", call.requests, call.sampling, in_time=True, call=call)

    def _ask(
        self, number: int, method: str, *arguments: Any, in_time: bool = False, call: Call | None = None
    ) -> None:
        """Call a method of an engine; with `in_time`, the engine is lost where no answer comes within `timeout_s`."""
        deadline = time.monotonic() + self._rollout.timeout_s if in_time else math.inf
        reference = getattr(self._actors[number], method).remote(*arguments)
        self._questions[reference] = _Question(number, method, deadline, call, self._fleet.version)

    def _awaiting(self, method: str) -> list[int]:
        """The engines that have yet to answer `method`."""
        return [question.engine for question in self._questions.values() if question.method == method]

    def _receive(self, reference: Any, question: _Question) -> None:
        try:
            answer = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            self._raised(question, error.cause)
        except ray.exceptions.RayError as error:
            self._lose(question.engine, f"died ({type(error).__name__})", "deaths")
        else:
            if question.method == "ready":
                self._fleet.loaded(question.engine, time.monotonic())
            elif question.method == "ping":
                self._fleet.answered_probe(question.engine, time.monotonic())
            elif question.call is not None:
                self._replied(question.call, answer, question.version)

    def _replied(self, call: Call, reply: Any, version: int | None) -> None:
        """An answer to `generate`, good or not."""
        problem = malformed(reply, call.requests, call.sampling, self._aborting)
        if problem is not None:
            self._counts.malformed += 1
            self._call_failed(call, f"gave a malformed reply: {problem}")
            return
        others = {generation.weight_version for generation in reply} - {version}
        if others:
            self._counts.malformed += 1
            self._lose(call.engine, f"answered with weight version {others.pop()}, not {version}")
            return
        self._dispatcher.answered(call)
        self._fleet.answered_call(call.engine)
        self._settled += [
            Settled(request.request_id, answer) for request, answer in zip(call.requests, reply, strict=True)
        ]

    def _raised(self, question: _Question, error: Exception) -> None:
        """An engine's method raised. A `UserError` on the first load or in a call is for the caller, who sees it at the next `poll`."""
        if question.call is not None:
            if isinstance(error, UserError):
                self._refusal = error
                self._give_back(question.call)
            else:
                self._call_failed(question.call, f"failed: {error!r}")
        elif (
            isinstance(error, UserError)
            and self._fleet.restarts(question.engine) == 0
            and question.method == "ready"
        ):
            self._refusal = error
        else:
            self._lose(question.engine, f"failed in {question.method}(): {error!r}", "deaths")

    def _call_failed(self, call: Call, reason: str) -> None:
        logger.warning("rollout engine %d %s (%d requests)", call.engine, reason, len(call.items))
        self._give_back(call)
        if self._fleet.failed_call(call.engine):
            self._lose(call.engine, f"failed {FAILURES_IN_A_ROW} calls in a row")

    def _give_back(self, call: Call) -> None:
        self._settled += [Settled(request_id, None) for request_id in self._dispatcher.failed(call)]

    def _lose(self, number: int, reason: str, count: str | None = None) -> None:
        """End an engine, send its requests again, and start it anew or retire it."""
        self._actors.kill(number)
        self._questions = {
            reference: question
            for reference, question in self._questions.items()
            if question.engine != number
        }
        for call in self._dispatcher.at(number):
            self._give_back(call)
        if count is not None:
            setattr(self._counts, count, getattr(self._counts, count) + 1)
        if self._fleet.lost(number, time.monotonic()):
            self._counts.restarts += 1
            next_step = (
                f"is started again ({self._fleet.restarts(number)} of {self._rollout.max_restarts} times)"
            )
            self._start(number)
        else:
            others = self._rollout.num_engines - len(self._fleet.numbers(State.RETIRED))
            next_step = f"is given up after {self._rollout.max_restarts} restarts; {others} left"
        self._last_loss = f"engine {number} {reason}"
        logger.warning("rollout engine %d %s and %s", number, reason, next_step)

    def _withdraw(self) -> None:
        """Settle what waits as aborted before it began."""
        nothing = Generation((), (), "abort", self._fleet.version or 0)
        self._settled += [Settled(request_id, nothing) for request_id in self._dispatcher.withdraw()]

    def _take_settled(self) -> list[Settled]:
        settled, self._settled = self._settled, []
        return settled

    def _raise_trouble(self) -> None:
        if self._refusal is not None:
            raise self._refusal
        if len(self._fleet.numbers(State.RETIRED)) == self._rollout.num_engines:
            raise UserError(
                f"no rollout engine is left after rollout.max_restarts = {self._rollout.max_restarts} restarts of each, the last "
                f"reason being that {self._last_loss}; see {RAY_LOGS}, then run the same command to resume"
            )


def _answered(references: list[Any], timeout_s: float) -> list[Any]:
    """Wait until one of the references is there, at most `timeout_s` (inf: no limit); return all that are."""
    if not references:
        time.sleep(timeout_s)
        return []
    ray.wait(references, num_returns=1, timeout=None if math.isinf(timeout_s) else timeout_s)
    return ray.wait(references, num_returns=len(references), timeout=0)[0]
