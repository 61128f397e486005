"""One scorer in a child process, without Ray: the same limits, and a fresh process after a failure that leaves none usable."""

import multiprocessing
import os
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from megatron_fipo.errors import UserError
from megatron_fipo.scorer.actor import ScorerActor
from megatron_fipo.scorer.protocol import (
    GRACE_S,
    START_TIMEOUT_S,
    Failure,
    FailureKind,
    ScoreRequest,
    ScorerSettings,
)
from megatron_fipo.tasks.task import Score


@dataclass(frozen=True)
class Answer:
    """What a scorer answered to a request, and how long it took."""

    result: list[Score] | Failure
    seconds: float


class ScorerChild:
    """A scorer whose process starts with the first request. As a context manager it ends it."""

    def __init__(self, settings: ScorerSettings) -> None:
        self._settings = settings
        self._process: Any = None
        self._connection: Connection | None = None

    def __enter__(self) -> "ScorerChild":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def score(self, request: ScoreRequest) -> Answer:
        """The scores of a request, or why there are none. Raises `UserError` if the scorer cannot load."""
        connection = self._connection or self._start()
        seconds = request.calls * self._settings.reward.timeout_s
        connection.send(request)
        start = time.monotonic()
        answer = self._receive(seconds + GRACE_S)
        if answer is None or isinstance(answer, EOFError):
            kind, what = FailureKind.DIED, "ended the process of the scorer"
            if answer is None:
                kind = FailureKind.HUNG
                what = f"did not answer within {seconds:g} s, and no Python signal interrupts it"
            reason = f"the reward function {what} for problem {request.problem.problem_id}"
            answer = Answer(Failure(kind, reason), time.monotonic() - start)
        if isinstance(answer.result, Failure) and not answer.result.kind.repeatable:
            self._end()  # as in a run: the next request gets a fresh process
        return answer

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._settings), daemon=True)
        try:
            process.start()
        except OSError as error:
            raise UserError(
                f"the scorer's process cannot start: {error.strerror}; free memory or processes"
            ) from error
        self._process = process
        theirs.close()  # so that the end of the process is the end of the connection
        self._connection = ours
        loaded = self._receive(START_TIMEOUT_S)
        if loaded is None or isinstance(loaded, EOFError):
            self._end()
            fault = "did not load in time" if loaded is None else "ended while it loaded"
            raise UserError(f"the scorer {fault}; its messages are above")
        if isinstance(loaded, UserError):
            self._end()
            raise loaded
        return ours

    def _receive(self, seconds: float) -> Any:
        """What the process sends; None after `seconds`, and an `EOFError` if it has ended."""
        assert self._connection is not None
        try:
            return self._connection.recv() if self._connection.poll(seconds) else None
        except (EOFError, ConnectionError):
            return EOFError()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None


def _serve(connection: Connection, settings: ScorerSettings) -> None:
    """The child: load, say so, and answer requests until it is killed."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns that there is no torch
    scorer = ScorerActor(settings)
    try:
        scorer.ready()
    except UserError as error:
        connection.send(error)
        return
    connection.send("loaded")
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        start = time.perf_counter()
        result = scorer.score(request)
        connection.send(Answer(result, time.perf_counter() - start))
