"""Responses of several turns: which request is at an engine, which turn at an environment. A state machine without Ray.

    submit ──> GENERATING ──stop──> ANSWERING ──observation──> GENERATING with a longer prefix
                   │                    │
          length, abort, failure   end, failure ──────────> a result

Every episode ends exactly once. Its engine requests continue one response: prompt, prefix, and what turns and observations have
added, so its tokens do not depend on how often it was interrupted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_fipo.driver.rollout.prompt_group import (
    EpisodeGeneration,
    EpisodeRequest,
    RequestResult,
    joined_routes,
)
from megatron_fipo.engine.protocol import (
    NO_LOG_PROBS,
    NO_TOKENS,
    Generation,
    GenerationRequest,
    SamplingParams,
)
from megatron_fipo.environments.protocol import TurnAnswer, TurnRequest
from megatron_fipo.tasks.task import Score

Submission = tuple[list[GenerationRequest], SamplingParams]


@dataclass(eq=False)
class _Episode:
    """One request and what its turns have added since it was submitted."""

    request: EpisodeRequest
    batch: "_Batch"
    place: int
    """In its batch."""
    token_ids: list[np.ndarray] = field(default_factory=list)
    log_probs: list[np.ndarray] = field(default_factory=list)
    observations: list[tuple[int, int]] = field(default_factory=list)
    """All of the response, those of its prefix included."""
    version: int = 0
    routes: list[np.ndarray] = field(default_factory=list)

    @property
    def tokens(self) -> np.ndarray:
        """The response so far, with its prefix."""
        return np.concatenate([self.request.prefix, *self.token_ids])

    @property
    def length(self) -> int:
        return len(self.request.prefix) + sum(map(len, self.token_ids))

    def add(self, generation: Generation) -> None:
        self.token_ids.append(generation.response_ids)
        self.log_probs.append(generation.log_probs)
        self.version = generation.weight_version
        if generation.routes is not None:
            self.routes.append(generation.routes)

    @property
    def routed(self) -> int:
        """Tokens of prompt and response whose routes are known."""
        return self.request.routed + sum(map(len, self.routes))

    def observe(self, token_ids: np.ndarray) -> None:
        start = self.length
        self.observations.append((start, start + len(token_ids)))
        self.token_ids.append(token_ids)
        self.log_probs.append(np.zeros(len(token_ids), NO_LOG_PROBS.dtype))

    def ended(self, finish_reason: str, score: Score | None = None) -> RequestResult:
        generation = EpisodeGeneration(
            np.concatenate([NO_TOKENS, *self.token_ids]),
            np.concatenate([NO_LOG_PROBS, *self.log_probs]),
            finish_reason,
            self.version,
            joined_routes(self.routes),
            observations=tuple(self.observations[len(self.request.observations) :]),
            score=score,
        )
        return RequestResult(self.request.request_id, generation)


@dataclass(eq=False)
class _Batch:
    """Episodes that were submitted together."""

    sampling: SamplingParams
    limit: int
    """Tokens of a response."""
    running: int = 0
    """Episodes at an engine or an environment."""
    ready: list[_Episode] = field(default_factory=list)
    """Those that continue at an engine."""


class Episodes:
    """All requests of problems with an environment.

    With `lockstep` the episodes of one `submit` continue together, when all of them are answered: the last bits of what an
    engine computes may depend on the other requests of its call.
    """

    def __init__(
        self, *, max_turns: int, stop: tuple[str, ...], stop_token_ids: tuple[int, ...], lockstep: bool
    ) -> None:
        self._max_turns = max_turns
        self._stop = stop
        self._stop_token_ids = stop_token_ids
        self._lockstep = lockstep
        self._episodes: dict[str, _Episode] = {}
        self._batches: dict[_Batch, None] = {}
        """Those with episodes that wait to continue, in order."""
        self._turns: list[TurnRequest] = []
        self._results: list[RequestResult] = []
        self._aborting = False
        self.truncated_observations = 0
        """Observations that were cut, for whoever takes them."""
        self.failed = 0
        """Episodes whose environment failed, for whoever takes them."""

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._episodes

    @property
    def outstanding(self) -> int:
        """Episodes that have not ended, or whose results were not taken."""
        return len(self._episodes) + len(self._results)

    # -- events ----------------------------------------------------------------------------------------------

    def submit(self, requests: Sequence[EpisodeRequest], sampling: SamplingParams) -> None:
        """Begin or resume episodes. Raises `ValueError` if one has the id of another that has not ended."""
        turn = replace(
            sampling,
            stop=tuple(dict.fromkeys(sampling.stop + self._stop)),
            stop_token_ids=tuple(dict.fromkeys(sampling.stop_token_ids + self._stop_token_ids)),
        )
        batch = _Batch(turn, sampling.max_new_tokens)
        for place, request in enumerate(requests):
            if request.request_id in self._episodes:
                raise ValueError(f"a request with the id {request.request_id} is already outstanding")
            episode = _Episode(request, batch, place, observations=list(request.observations))
            self._episodes[request.request_id] = episode
            batch.ready.append(episode)
        self._batches[batch] = None

    def generated(self, result: RequestResult) -> None:
        """An engine's result for one of the submissions."""
        episode = self._episodes[result.request_id]
        episode.batch.running -= 1
        generation = result.generation
        if generation is None:
            self._end(episode, result)
            return
        episode.add(generation)
        if generation.finish_reason != "stop":
            self._end(episode, episode.ended(generation.finish_reason))
            return
        episode.batch.running += 1
        last = len(episode.observations) + 1 >= self._max_turns
        self._turns.append(
            TurnRequest(
                episode.request.request_id,
                episode.request.problem,
                episode.tokens,
                tuple(episode.observations),
                space=0 if last else max(0, episode.batch.limit - episode.length - 1),
            )
        )

    def answered(self, request_id: str, answer: TurnAnswer | None) -> None:
        """The environment's answer to a turn; None if it failed."""
        episode = self._episodes[request_id]
        episode.batch.running -= 1
        if answer is None:
            self.failed += 1
            self._end(episode, RequestResult(request_id, None, environment_failed=True))
        elif answer.finish_reason is not None:
            self._end(episode, episode.ended(answer.finish_reason, answer.score))
        else:
            self.truncated_observations += answer.truncated
            episode.observe(answer.observation)
            if self._aborting:
                self._end(episode, episode.ended("abort"))
            else:
                episode.batch.ready.append(episode)
                self._batches[episode.batch] = None

    def begin_abort(self) -> None:
        """Until `end_abort` no episode continues: those that would return as they are, with reason `abort`."""
        self._aborting = True
        for batch in list(self._batches):
            for episode in batch.ready:
                self._end(episode, episode.ended("abort"))
            batch.ready.clear()
        self._batches.clear()

    def end_abort(self) -> None:
        self._aborting = False

    # -- what to do ------------------------------------------------------------------------------------------

    def take_submissions(self) -> list[Submission]:
        """Requests for the engines, with their sampling; the requests of one submission go in one call."""
        submissions: list[Submission] = []
        for batch in list(self._batches):
            if self._lockstep and batch.running:
                continue
            batch.running += len(batch.ready)
            requests = [self._request(e) for e in sorted(batch.ready, key=lambda episode: episode.place)]
            batch.ready = []
            del self._batches[batch]
            if submissions and not self._lockstep and submissions[-1][1] == batch.sampling:
                submissions[-1][0].extend(requests)
            else:
                submissions.append((requests, batch.sampling))
        return submissions

    def take_turns(self) -> list[TurnRequest]:
        """Turns for the environments."""
        turns, self._turns = self._turns, []
        return turns

    def take_results(self) -> list[RequestResult]:
        """Results of episodes that have ended."""
        results, self._results = self._results, []
        return results

    def _request(self, episode: _Episode) -> GenerationRequest:
        request = episode.request
        return GenerationRequest(
            request.request_id, request.prompt_ids, request.seed, episode.tokens, episode.routed
        )

    def _end(self, episode: _Episode, result: RequestResult) -> None:
        del self._episodes[episode.request.request_id]
        self._results.append(result)
