"""The scorers as one: finished groups in, scores out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_fipo.driver.workers.failures import FailureWatch, Wording
from megatron_fipo.driver.workers.pool import WorkerCounts, WorkerPool
from megatron_fipo.scorer.protocol import Failure, FailureKind, ScoreRequest, ScorerSettings
from megatron_fipo.tasks.task import Score

WORDING = Wording("reward", "reward function", "groups could not be scored")


@dataclass(frozen=True, eq=False)
class ScoreResult:
    """The result of a request."""

    request: ScoreRequest
    scores: list[Score] | None
    """In the order of the responses; None if one could not be scored."""


@dataclass
class ScorerCounts(WorkerCounts):
    """What happened to scorers and groups, those of evaluations included."""

    judge_retries: int = 0
    """Requests that rewards sent again to their servers."""
    judge_failures: int = 0
    """Groups without scores because a server could not be reached or gave no scores."""


class ScorerPool(WorkerPool[ScoreRequest, list[Score], ScoreResult, ScorerCounts]):
    """`size` actors of one class (see `protocol.Scorer`), numbered from 0. Single-threaded."""

    noun = "scorer"
    method = "score_and_count"
    counts = ScorerCounts
    result = ScoreResult

    def __init__(
        self,
        actor_class: type,
        settings: ScorerSettings,
        size: int,
        *,
        max_failure_share: float,
        log: Callable[[str], None],
    ) -> None:
        """Start the actors. `log` receives failures (`FailureWatch`)."""
        watch = FailureWatch(max_failure_share, log, WORDING)
        super().__init__(actor_class, settings, size, timeout_s=settings.reward.timeout_s, watch=watch)

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

    def _answered(self, number: int, request: ScoreRequest | None, answer: Any) -> None:
        if request is not None:
            answer, retries = answer
            self._counts.judge_retries += retries
        super()._answered(number, request, answer)

    def _failed(self, failure: Failure) -> None:
        self._counts.judge_failures += failure.kind is FailureKind.UNAVAILABLE
        super()._failed(failure)
