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
        self._loaded_version = loaded_version
        self._engines = [_Engine(deadline=now + load_timeout_s) for _ in range(size)]

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

    def restarts(self, number: int) -> int:
        return self._engines[number].restarts

    # -- events ------------------------------------------------------------------------------------------

    def loaded(self, number: int, now: float) -> None:
        engine = self._engines[number]
        engine.loaded, engine.version, engine.deadline = True, self._loaded_version, None
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

    def answered_probe(self, number: int, now: float) -> None:
        engine = self._engines[number]
        engine.deadline, engine.suspect, engine.next_probe = None, False, now + self._probe_interval_s

    def answered_call(self, number: int) -> None:
        self._engines[number].failures = 0

    def failed_call(self, number: int) -> bool:
        """A call brought an error or a malformed reply. True if the engine must be restarted (`lost`)."""
        self._engines[number].failures += 1
        return self._engines[number].failures >= FAILURES_IN_A_ROW

    def lost(self, number: int, now: float) -> bool:
        """The engine died or was killed. True if it is to be started again; else it is retired."""
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
        return min(times)

    @property
    def _probe_interval_s(self) -> float:
        return self._health_timeout_s / 4
