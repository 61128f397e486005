"""Engines and environments as one pool: requests in, responses of one or several turns out.

`episodes` decides which request is where; the pool passes messages between it, the engines and the environments. Requests of
problems without an environment go to the engines and back unchanged.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_fipo.config import EnvironmentConfig
from megatron_fipo.driver.rollout.environments import EnvironmentPool, TurnsResult
from megatron_fipo.driver.rollout.episodes import Episodes
from megatron_fipo.driver.rollout.pool import EnginePool
from megatron_fipo.driver.rollout.prompt_group import (
    EpisodeRequest,
    GroupRequest,
    RequestResult,
    answer_groups,
)
from megatron_fipo.driver.workers.pool import WorkerCounts
from megatron_fipo.engine.protocol import Generation, GenerationRequest, SamplingParams
from megatron_fipo.environments.protocol import TurnAnswer

ANSWERS_WAIT_S = 0.02
"""Longest wait for answers of environments, during which results of engines are not taken."""


@dataclass
class EnvironmentCounts(WorkerCounts):
    """What happened to environments, those of evaluations included."""

    failed: int = 0
    """Responses that ended because their environment failed twice."""
    truncated_observations: int = 0
    """Observations longer than `environment.max_observation_tokens`."""


class EpisodePool:
    """A `prompt_group.RequestPool`. Single-threaded."""

    def __init__(
        self,
        engines: EnginePool,
        environments: EnvironmentPool,
        settings: EnvironmentConfig,
        *,
        lockstep: bool,
    ) -> None:
        """`lockstep`: the requests of one `submit` are sent together in each turn (`Episodes`)."""
        self._engines = engines
        self._environments = environments
        self._episodes = Episodes(
            max_turns=settings.max_turns,
            stop=settings.stop,
            stop_token_ids=settings.stop_token_ids,
            lockstep=lockstep,
        )
        self._single_turn = 0
        """Requests without an environment at the engines."""

    @property
    def outstanding(self) -> int:
        """Requests submitted and not yet returned with a result."""
        return self._single_turn + self._episodes.outstanding

    def submit(self, requests: Sequence[GenerationRequest], sampling: SamplingParams) -> None:
        """As `EnginePool.submit`."""
        single_turn = [request for request in requests if not isinstance(request, EpisodeRequest)]
        episodes = [request for request in requests if isinstance(request, EpisodeRequest)]
        if single_turn:
            self._single_turn += len(single_turn)
            self._engines.submit(single_turn, sampling)
        if episodes:
            self._episodes.submit(episodes, sampling)
        self._send()

    def poll(self, timeout_s: float) -> list[RequestResult]:
        """As `EnginePool.poll`; also raises `UserError` if environments fail too often."""
        until = time.monotonic() + timeout_s
        results: list[RequestResult] = []
        while True:
            left = 0.0 if results else max(0.0, until - time.monotonic())
            answering = self._environments.outstanding > 0
            results += self._received(self._engines.poll(0.0 if answering else left))
            if self._environments.outstanding:
                wait = ANSWERS_WAIT_S if self._engines.outstanding else left
                self._answered(self._environments.poll(min(left, wait)))
            self._send()
            results += self._episodes.take_results()
            if results or time.monotonic() >= until:
                return results

    def abort(self) -> list[RequestResult]:
        """As `EnginePool.abort`. Turns that have ended are answered first, within the limits of time, so that an unfinished
        response ends after a complete observation or within a turn."""
        self._episodes.begin_abort()
        results = self._received(self._engines.abort())
        self._answered(self._environments.finish())
        self._episodes.end_abort()
        return results + self._episodes.take_results()

    def generate(self, groups: Sequence[GroupRequest]) -> list[Generation | None]:
        """As `EnginePool.generate`."""
        self._engines.loaded(wait=True)
        return answer_groups(self, groups, 1.0)

    def take_counts(self) -> EnvironmentCounts:
        """The counts since the last call."""
        counts = EnvironmentCounts(
            **vars(self._environments.take_counts()),
            failed=self._episodes.failed,
            truncated_observations=self._episodes.truncated_observations,
        )
        self._episodes.failed = self._episodes.truncated_observations = 0
        return counts

    def shutdown(self) -> None:
        """Kill the processes of the environments; the engines stay."""
        self._environments.shutdown()

    def _send(self) -> None:
        for requests, sampling in self._episodes.take_submissions():
            self._engines.submit(requests, sampling)

    def _received(self, results: Iterable[RequestResult]) -> list[RequestResult]:
        """Give the engines' results to the episodes; returns those of requests without an environment."""
        others = []
        for result in results:
            if result.request_id in self._episodes:
                self._episodes.generated(result)
            else:
                others.append(result)
        self._single_turn -= len(others)
        self._environments.submit_turns(self._episodes.take_turns())
        return others

    def _answered(self, results: Iterable[TurnsResult]) -> None:
        for result in results:
            answers = result.answers or (None,) * len(result.request.turns)
            for turn, answer in zip(result.request.turns, answers, strict=True):
                self._episodes.answered(turn.episode_id, answer if isinstance(answer, TurnAnswer) else None)
