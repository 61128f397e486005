"""The engine pool of a simulation: what `LiveGroups` and `Collector` need of `driver.rollout.pool.EnginePool`.

Dispatch, its KV budget and the states of engines are the driver's own; messages, processes and health probes are left out, so
the driver always knows how many requests an engine has in its queue.
"""

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from megatron_fipo.config import RolloutConfig
from megatron_fipo.driver.rollout.dispatch import Call, Dispatcher
from megatron_fipo.driver.rollout.fleet import Fleet, State
from megatron_fipo.driver.rollout.kv_budget import REMEMBERED, KVBudget
from megatron_fipo.driver.rollout.losses import PoolCounts
from megatron_fipo.driver.rollout.prompt_group import RequestResult
from megatron_fipo.driver.scoring.pool import ScoreResult
from megatron_fipo.engine.protocol import EngineStatus, Generation, GenerationRequest, SamplingParams
from megatron_fipo.errors import UserError
from megatron_fipo.scorer.protocol import ScoreRequest
from megatron_fipo.simulate.engine import Engine, Running
from megatron_fipo.simulate.responses import Responses
from megatron_fipo.simulate.times import Times


@dataclass
class Clock:
    """The driver's clock, in seconds."""

    now: float = 0.0
    horizon: float = math.inf
    """The pool advances the clock to its next event, but not beyond this: the trainer is then done."""

    def advance(self, seconds: float) -> None:
        self.now += seconds


class Load(NamedTuple):
    """An engine has `running` sequences from `at` on."""

    at: float
    engine: int
    running: int


@dataclass
class Usage:
    """Of all engines, since the last `SimulatedPool.take_engine_usage`."""

    busy_s: float = 0.0
    """Seconds with a sequence, added up over the engines."""
    sequence_s: float = 0.0
    """Running sequences, summed over seconds."""
    preemptions: int = 0
    lost_tokens: int = 0
    """Sampled by engines that failed before they answered."""
    failures: int = 0
    loads: list[Load] = field(default_factory=list)

    def add(self, engine: Engine) -> None:
        """What the engine did; its counts begin again."""
        self.busy_s += engine.busy_s
        self.sequence_s += engine.sequence_s
        self.preemptions += engine.preemptions
        engine.busy_s, engine.sequence_s, engine.preemptions = 0.0, 0.0, 0


class SimulatedPool:
    """`rollout.num_engines` simulated engines, loaded and without weights when the simulation begins. The KV budget knows the
    lengths of responses as in a run that is under way.

    `poll` waits for the next event and ignores the timeout, after which the real driver looks for signals.
    """

    def __init__(
        self,
        rollout: RolloutConfig,
        times: Times,
        responses: Responses,
        clock: Clock,
        *,
        keep_batches: bool = False,
        failures: Iterable[tuple[float, int]] = (),
    ) -> None:
        """`failures`: when which engine fails, in seconds of the clock."""
        longest = rollout.longest_sequence
        if times.cache_tokens is not None and times.cache_tokens < longest:
            raise UserError(
                f"the KV cache of an engine holds {times.cache_tokens:,.0f} tokens, fewer than the longest prompt and response "
                f"({longest:,}): raise rollout.engine_tensor_parallel_size or rollout.gpu_memory_share"
            )
        self.clock = clock
        self._times = times
        self._responses = responses
        self._rollout = rollout
        self._dispatcher = Dispatcher(
            requests_per_call=times.requests_per_call,
            calls_at_once=1 if keep_batches else times.calls_at_once,
            max_retries=rollout.max_retries,
            keep_batches=keep_batches,
        )
        self._fleet = Fleet.of(rollout, None, clock.now)
        self._budget = KVBudget(longest)
        for length in responses.typical(REMEMBERED):
            self._budget.finished(responses.prompt_tokens, length)
        self._engines = [Engine(times, clock.now) for _ in range(rollout.num_engines)]
        self._free = EngineStatus(0, tokens=0, kv_tokens=times.cache_tokens)
        self._full = replace(self._free, waiting=1)
        self._may_start = False
        """Whether a request may start that could not at the last dispatch."""
        for number in range(rollout.num_engines):
            self._fleet.loaded(number, self._status(number), clock.now)
        self._events: list[tuple[float, int, int]] = []
        """(time, engine, count of the engine's changes when it was computed); those with an older count are void."""
        self._changes = [0] * rollout.num_engines
        self._failures = sorted(failures, reverse=True)
        self._loading: list[tuple[float, int]] = []
        """A heap of (time at which it has loaded, engine)."""
        self._remaining: dict[Call, list[Running]] = {}
        """All responses of each running call, and below how many of them have not ended."""
        self._open: dict[Call, int] = {}
        self._results: list[RequestResult] = []
        self._usage = Usage()
        self._states_changed()
        self._tokens = np.zeros(longest, np.int32)
        self._log_probs = np.zeros(longest, np.float32)

    # -- requests --------------------------------------------------------------------------------------------

    @property
    def outstanding(self) -> int:
        return self._dispatcher.outstanding + len(self._results)

    def submit(self, requests: Sequence[GenerationRequest], sampling: SamplingParams) -> None:
        size = self._times.requests_per_call
        for start in range(0, len(requests), size):
            self._dispatcher.submit(requests[start : start + size], sampling)
        self._may_start = True

    def poll(self, timeout_s: float) -> list[RequestResult]:
        """Wait for the next answers, the loss or start of an engine, or `clock.horizon`; return the new results."""
        self._dispatch()
        while not self._results:
            sequence_at = self._next_sequence_event()
            other_at = min(self._next_failure, self._next_loaded)
            at = min(sequence_at, other_at)
            if at > self.clock.horizon:
                self.clock.now = max(self.clock.now, self.clock.horizon)
                break
            if at == math.inf:
                raise RuntimeError("the driver waits, and no simulated engine has a request")
            self.clock.now = max(self.clock.now, at)
            if other_at <= sequence_at:
                self._fail_or_load()
                break
            self._fire(self._events[0][1])
        self._dispatch()
        return self._take_results()

    def abort(self) -> list[RequestResult]:
        for call in [call for number in self._dispatcher.busy for call in self._dispatcher.at(number)]:
            self._dispatcher.answered(call)
            self._fleet.answered_call(call.engine, len(call.items), self.clock.now)
        for number, engine in enumerate(self._engines):
            engine.abort(self.clock.now)
            self._changed(number)
        for sequences in self._remaining.values():
            self._answer(sequences)
        self._remaining.clear()
        self._open.clear()
        empty = Generation.not_started(self._fleet.version or 0)
        self._results += [RequestResult(request_id, empty) for request_id in self._dispatcher.withdraw()]
        return self._take_results()

    # -- engines ---------------------------------------------------------------------------------------------

    @property
    def starting(self) -> bool:
        return bool(self._loading)

    def loaded(self, wait: bool) -> dict[int, Any]:
        """The loaded engines; there are no handles."""
        while wait and self._loading:
            self.clock.now = max(self.clock.now, self._loading[0][0])
            self._fail_or_load()
        return dict.fromkeys(self._fleet.numbers(State.STALE, State.SERVING))

    def stale(self) -> dict[int, Any]:
        return dict.fromkeys(self._stale)

    def updated(self, numbers: Iterable[int], version: int) -> None:
        self._fleet.updated(numbers, version)
        self._states_changed()

    def sleep(self) -> None:
        self.loaded(wait=True)
        self.clock.advance(self._times.sleep)
        self._fleet.forgot_weights()
        self._states_changed()

    def wake(self) -> None:
        self.clock.advance(self._times.wake)

    def take_counts(self) -> PoolCounts:
        retries, self._dispatcher.retries = self._dispatcher.retries, 0
        return PoolCounts(retries=retries)

    def take_engine_usage(self) -> Usage:
        """What the engines did since the last call."""
        usage, self._usage = self._usage, Usage()
        for engine in self._engines:
            engine.advance(self.clock.now)
            usage.add(engine)
        return usage

    # -- one event -------------------------------------------------------------------------------------------

    @property
    def _next_failure(self) -> float:
        return self._failures[-1][0] if self._failures else math.inf

    @property
    def _next_loaded(self) -> float:
        return self._loading[0][0] if self._loading else math.inf

    def _next_sequence_event(self) -> float:
        while self._events and self._events[0][2] != self._changes[self._events[0][1]]:
            heapq.heappop(self._events)
        return self._events[0][0] if self._events else math.inf

    def _fail_or_load(self) -> None:
        if self._next_failure <= self._next_loaded:
            self._fail(self._failures.pop()[1])
        else:
            number = heapq.heappop(self._loading)[1]
            self._engines[number] = Engine(self._times, self.clock.now)
            self._fleet.loaded(number, self._status(number), self.clock.now)
            self._states_changed()

    def _fire(self, number: int) -> None:
        for sequence in self._engines[number].fire():
            call = sequence.call
            self._open[call] -= 1
            if not self._open[call]:
                del self._open[call]
                self._dispatcher.answered(call)
                self._fleet.answered_call(number, len(call.items), self.clock.now)
                self._answer(self._remaining.pop(call))
        self._changed(number)

    def _fail(self, number: int) -> None:
        """The engine is lost with what it has sampled; its requests are sent again. No other engine notices."""
        if self._fleet.state(number) not in (State.STALE, State.SERVING):
            return
        self._usage.failures += 1
        self._engines[number].abort(self.clock.now)
        self._usage.add(self._engines[number])
        for call in self._dispatcher.at(number):
            del self._open[call]
            self._usage.lost_tokens += sum(
                sequence.done - len(sequence.request.prefix) for sequence in self._remaining.pop(call)
            )
            self._results += [RequestResult(name, None) for name in self._dispatcher.failed(call)]
        if self._fleet.lost(number, self.clock.now):
            heapq.heappush(self._loading, (self.clock.now + self._times.engine_restart, number))
        elif not self._loading and not self._fleet.numbers(State.STALE, State.SERVING):
            raise UserError(
                f"no rollout engine is left after rollout.max_restarts = {self._rollout.max_restarts} restarts of each: the "
                "rate of engine failures is too high for a run"
            )
        self._changed(number)
        self._states_changed()

    def _dispatch(self) -> None:
        if not self._may_start or not self._dispatcher.waiting:
            return
        space = {
            number: self._budget.space(self._status(number), self._unfinished(number))
            for number in self._serving
        }
        arrived: dict[int, list[Running]] = {}
        for call in self._dispatcher.start_calls(space):
            self._fleet.called(call.engine, len(call.items), self.clock.now)
            sequences = [
                Running(request, call, self._responses.length(request), len(request.prefix))
                for request in call.requests
            ]
            self._remaining[call], self._open[call] = sequences, len(sequences)
            arrived.setdefault(call.engine, []).extend(sequences)
        for number, sequences in arrived.items():
            self._engines[number].submit(sequences, self.clock.now)
            self._changed(number)
        self._may_start = False

    def _answer(self, sequences: Sequence[Running]) -> None:
        """Results of a call, ended or aborted."""
        version = self._fleet.version or 0
        for sequence in sequences:
            request = sequence.request
            new = sequence.done - len(request.prefix)
            if sequence.done < sequence.length:
                reason = "abort"
            else:
                reason = "length" if sequence.done >= self._rollout.max_response_length else "stop"
                self._budget.finished(len(request.prompt_ids), sequence.done)
            generation = Generation(self._tokens[:new], self._log_probs[:new], reason, version)
            self._results.append(RequestResult(request.request_id, generation))

    def _status(self, number: int) -> EngineStatus:
        """What decides whether the engine has space: nothing but whether a request waits in it."""
        return self._full if self._engines[number].waiting else self._free

    def _unfinished(self, number: int) -> int:
        """As the engine's status tells it; that of a run is up to two probes old."""
        return self._engines[number].running + self._engines[number].waiting

    def _changed(self, number: int) -> None:
        """The engine's next event is another, and it may have space for another call."""
        self._may_start = True
        self._changes[number] += 1
        engine = self._engines[number]
        at = engine.next_event
        if at < math.inf:
            heapq.heappush(self._events, (at, number, self._changes[number]))
        self._usage.loads.append(Load(self.clock.now, number, engine.running))

    def _states_changed(self) -> None:
        self._serving = self._fleet.numbers(State.SERVING)
        self._stale = self._fleet.numbers(State.STALE)
        self._may_start = True

    def _take_results(self) -> list[RequestResult]:
        results, self._results = self._results, []
        return results


class SimulatedScorers:
    """Scoring that takes no time: a group takes milliseconds, its responses minutes."""

    def __init__(self, responses: Responses) -> None:
        self._responses = responses
        self._results: list[ScoreResult] = []

    def submit(self, request: ScoreRequest) -> None:
        self._results.append(ScoreResult(request, self._responses.scores(request)))

    def poll(self, timeout_s: float) -> list[ScoreResult]:
        return self.finish()

    def finish(self) -> list[ScoreResult]:
        results, self._results = self._results, []
        return results
