"""The processes of environments as one: turns in, answers out."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_fipo.driver.workers.failures import FailureWatch, Wording
from megatron_fipo.driver.workers.pool import WorkerCounts, WorkerPool
from megatron_fipo.environments.protocol import (
    MAX_ATTEMPTS,
    Answers,
    TurnRequest,
    TurnsRequest,
    WorkerSettings,
)
from megatron_fipo.scorer.protocol import Failure

WORDING = Wording("environment", "environment", "answers of environments failed")
TURNS_PER_CALL = 32
"""A call costs the driver about a millisecond. A lost process costs all of its turns a second call."""


@dataclass(frozen=True, eq=False)
class TurnsResult:
    """The result of a request."""

    request: TurnsRequest
    answers: Answers | None
    """None if the request lost its worker as often as it may."""


class EnvironmentPool(WorkerPool[TurnsRequest, Answers, TurnsResult, WorkerCounts]):
    """`size` actors of one class (see `protocol.EnvironmentWorker`), numbered from 0. Single-threaded.

    Turns that lose their worker together are sent again alone, so that the one that is to blame fails alone.
    """

    noun = "environment worker"
    method = "answer"
    counts = WorkerCounts
    result = TurnsResult

    def __init__(
        self,
        actor_class: type,
        settings: WorkerSettings,
        size: int,
        *,
        max_failure_share: float,
        log: Callable[[str], None],
    ) -> None:
        """Start the actors. `log` receives failures (`FailureWatch`)."""
        watch = FailureWatch(max_failure_share, log, WORDING)
        super().__init__(actor_class, settings, size, timeout_s=settings.timeout_s, watch=watch)
        self._size = size
        self._keys = itertools.count()

    def submit_turns(self, turns: Sequence[TurnRequest]) -> None:
        """Queue turns of different episodes, each for the worker of its episode."""
        by_worker: dict[int, list[TurnRequest]] = defaultdict(list)
        for turn in turns:
            by_worker[turn.worker(self._size)].append(turn)
        for worker, own in by_worker.items():
            for start in range(0, len(own), TURNS_PER_CALL):
                part = tuple(own[start : start + TURNS_PER_CALL])
                attempts = MAX_ATTEMPTS if len(part) == 1 else 1
                self.submit(TurnsRequest(next(self._keys), part, worker, attempts))

    def failures(self, answer: Answers) -> Sequence[Failure | None]:
        return [part if isinstance(part, Failure) else None for part in answer]

    def _given_up(self, key: int, failure: Failure) -> None:
        if len(self._requests[key].turns) == 1:
            super()._given_up(key, failure)
            return
        request = self._requests.pop(key)
        self._counts.retries += len(request.turns)
        for turn in request.turns:
            self.submit(TurnsRequest(next(self._keys), (turn,), request.place, MAX_ATTEMPTS))
