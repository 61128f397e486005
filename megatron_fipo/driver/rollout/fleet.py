"""The state of each engine: a state machine without engines, Ray or a clock.

    STARTING ──loaded──> STALE ──updated──> SERVING ──another version is current──> STALE
        ^                  │ ^ answer          │ ^ answer
        │                  v │  slow probe     v │
        └──── lost ────── SUSPECT ─────────── SUSPECT          lost too often ──> RETIRED

Times are arguments, in seconds of any clock.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from megatron_fipo.config import RolloutConfig
from megatron_fipo.driver.rollout.engine_usage import EngineUsage, UsageMeter
from megatron_fipo.engine.protocol import NO_WEIGHTS, EngineStatus

FORGIVEN_AFTER_ANSWERS = 1000
"""Responses that an engine gives after which its earlier restarts count no more."""
PROBE_EVERY_S = 2.0
"""Longest time between two health probes. They also report whether an engine has space for more requests."""
FAILURES_IN_A_ROW = 3
"""Consecutive calls without a usable reply after which the engine counts as broken."""


class State(Enum):
    STARTING = "starting"
    """The process is starting or loading its model."""
    STALE = "stale"
    """Loaded, without the current weights: gets no requests."""
    SERVING = "serving"
    """Loaded, with the current weights."""
    SUSPECT = "suspect"
    """Loaded, but slow to answer a health probe: gets no new requests until it answers."""
    RETIRED = "retired"
    """Lost more often than `max_restarts`; not started again."""


@dataclass
class _Engine:
    deadline: float | None
    """When the load or the unanswered probe is overdue; None if neither is pending."""
    loaded: bool = False
    version: int | None = None
    suspect: bool = False
    next_probe: float = math.inf
    calls: int = 0
    """Calls of `generate` that it has not answered."""
    status: EngineStatus = EngineStatus(NO_WEIGHTS, tokens=0)  # noqa: RUF009 (frozen)
    """As of its last answered probe."""
    sent: int = 0
    """Requests sent since it was started."""
    sent_before_probes: tuple[int, int] = (0, 0)
    """The same when the last two probes were sent, the older one first."""
    sent_before_status: int = 0
    """The same, that `status` counts for certain: an engine may take a step to see a request."""
    progress_due: float = math.inf
    """When it counts as hung unless it has computed a token; inf without a call."""
    answers: int = 0
    """Responses since it was started."""
    failures: int = 0
    restarts: int = 0
    retired: bool = False


class Fleet:
    """Engines `0 .. size-1`. The pool reports what happened and does what the methods return."""

    def __init__(
        self,
        size: int,
        *,
        max_restarts: int,
        load_timeout_s: float,
        health_timeout_s: float,
        stall_timeout_s: float,
        loaded_version: int | None,
        now: float,
    ) -> None:
        """All engines are starting.

        A loaded engine has weights of `loaded_version`, or (None) none that may serve.
        """
        self.version = loaded_version
        """The current weight version. Only engines that have it serve."""
        self.max_restarts = max_restarts
        self._load_timeout_s = load_timeout_s
        self._health_timeout_s = health_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._loaded_version = loaded_version
        self._engines = [_Engine(deadline=now + load_timeout_s) for _ in range(size)]
        self._meters = [UsageMeter(now) for _ in range(size)]

    @classmethod
    def of(cls, rollout: RolloutConfig, loaded_version: int | None, now: float) -> "Fleet":
        """The engines of a run, all starting."""
        return cls(
            rollout.num_engines,
            max_restarts=rollout.max_restarts,
            load_timeout_s=rollout.timeout_s,
            health_timeout_s=rollout.health_timeout_s,
            stall_timeout_s=rollout.stall_timeout_s,
            loaded_version=loaded_version,
            now=now,
        )

    @property
    def size(self) -> int:
        """How many engines there are, retired ones included."""
        return len(self._engines)

    def state(self, number: int) -> State:
        engine = self._engines[number]
        if engine.retired:
            return State.RETIRED
        if not engine.loaded:
            return State.STARTING
        if engine.suspect:
            return State.SUSPECT
        return State.SERVING if engine.version is not None and engine.version == self.version else State.STALE

    def numbers(self, *states: State) -> list[int]:
        """The engines in one of `states`, in order."""
        return [number for number in range(len(self._engines)) if self.state(number) in states]

    def status(self, number: int) -> EngineStatus:
        """What the engine reported last."""
        return self._engines[number].status

    def restarts(self, number: int) -> int:
        return self._engines[number].restarts

    def take_usage(self, now: float) -> list[EngineUsage]:
        """What each engine did since the last call."""
        return [meter.take(now) for meter in self._meters]

    # -- events ------------------------------------------------------------------------------------------

    def loaded(self, number: int, status: EngineStatus, now: float) -> None:
        engine = self._engines[number]
        engine.loaded, engine.version, engine.deadline = True, self._loaded_version, None
        engine.status = status
        self._meters[number].probed(status)
        engine.next_probe = now + self._probe_interval_s

    def updated(self, numbers: Iterable[int], version: int) -> None:
        """`version` is current and these engines have it.

        All others are stale, including one restarted meanwhile.
        """
        self.version = version
        for number in numbers:
            if self._engines[number].loaded:
                self._engines[number].version = version

    def forgot_weights(self) -> None:
        """No engine has weights any more."""
        for engine in self._engines:
            engine.version = None

    def answered_probe(self, number: int, status: EngineStatus, now: float) -> None:
        engine = self._engines[number]
        engine.deadline, engine.suspect, engine.next_probe = None, False, now + self._probe_interval_s
        if status.tokens != engine.status.tokens:
            self._progressed(engine, now)
        engine.status = status
        engine.sent_before_status = engine.sent_before_probes[0]
        self._meters[number].probed(status)

    def unfinished(self, number: int) -> int:
        """At most so many requests are unfinished at the engine: those it reported last, and those sent since.

        A call ends with its longest response, so most requests of a call may have finished long before.
        """
        engine = self._engines[number]
        return engine.status.running + engine.status.waiting + engine.sent - engine.sent_before_status

    def called(self, number: int, requests: int, now: float) -> None:
        """A call of `generate` was sent."""
        engine = self._engines[number]
        engine.sent += requests
        engine.calls += 1
        if engine.calls == 1:
            self._progressed(engine, now)
            self._meters[number].began(now)

    def answered_call(self, number: int, answers: int, now: float) -> None:
        """A call brought `answers` responses."""
        engine = self._engines[number]
        engine.failures = 0
        engine.answers += answers
        if engine.answers >= FORGIVEN_AFTER_ANSWERS:
            engine.restarts = 0
        self._call_ended(number, now)

    def failed_call(self, number: int, now: float) -> bool:
        """A call brought an error or a malformed reply. True if the engine must be restarted (`lost`)."""
        engine = self._engines[number]
        engine.failures += 1
        self._call_ended(number, now)
        return engine.failures >= FAILURES_IN_A_ROW

    def _call_ended(self, number: int, now: float) -> None:
        engine = self._engines[number]
        engine.calls -= 1
        self._progressed(engine, now)
        if engine.calls == 0:
            self._meters[number].ended(now)

    def _progressed(self, engine: _Engine, now: float) -> None:
        engine.progress_due = now + self._stall_timeout_s if engine.calls else math.inf

    def lost(self, number: int, now: float) -> bool:
        """The engine died or was killed. True if it is to be started again; else it is retired."""
        self._meters[number].lost(now)
        restarts = self._engines[number].restarts
        retired = restarts >= self.max_restarts
        deadline = None if retired else now + self._load_timeout_s
        self._engines[number] = _Engine(deadline, restarts=restarts + (not retired), retired=retired)
        return not retired

    # -- deadlines ---------------------------------------------------------------------------------------

    def probes_due(self, now: float) -> list[int]:
        """The engines to send a health probe to. Engines that take too long to answer one become suspect."""
        due = []
        for number in self.numbers(State.STALE, State.SERVING):
            engine = self._engines[number]
            if engine.deadline is None and engine.next_probe <= now:
                engine.deadline = now + self._health_timeout_s
                engine.sent_before_probes = (engine.sent_before_probes[1], engine.sent)
                due.append(number)
            elif (
                engine.deadline is not None
                and engine.deadline - self._health_timeout_s + self._probe_interval_s <= now
            ):
                engine.suspect = True
        return due

    @property
    def probing(self) -> list[int]:
        """The engines with an unanswered health probe."""
        return [
            number
            for number, engine in enumerate(self._engines)
            if engine.loaded and engine.deadline is not None
        ]

    def probe_all(self) -> None:
        """Make a probe of each loaded engine due at once."""
        for engine in self._engines:
            engine.next_probe = -math.inf

    def overdue(self, now: float) -> list[tuple[int, str]]:
        """(engine, what it did not do in time) of each engine that counts as hung and must be restarted."""
        late: list[tuple[int, str]] = []
        for number, engine in enumerate(self._engines):
            if engine.deadline is not None and engine.deadline <= now:
                late.append((number, self._overdue_reason(engine)))
            elif engine.calls and engine.progress_due <= now:
                late.append(
                    (
                        number,
                        f"computed no token of its {engine.calls} calls within rollout.stall_timeout_s = "
                        f"{self._stall_timeout_s:g} s",
                    )
                )
        return late

    def _overdue_reason(self, engine: _Engine) -> str:
        if engine.loaded:
            return (
                f"left a health probe unanswered for rollout.health_timeout_s = {self._health_timeout_s:g} s"
            )
        return f"did not load within rollout.timeout_s = {self._load_timeout_s:g} s"

    def next_event(self) -> float:
        """The next time at which a probe is due or something is overdue; inf if there is none."""
        times = [math.inf]
        for number in self.numbers(State.STARTING, State.STALE, State.SERVING, State.SUSPECT):
            engine = self._engines[number]
            times.append(engine.next_probe if engine.deadline is None else engine.deadline)
            times.append(engine.progress_due)
        return min(times)

    @property
    def _probe_interval_s(self) -> float:
        return min(self._health_timeout_s / 4, PROBE_EVERY_S)
