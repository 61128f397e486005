"""The responses to one prompt: tokens of several calls and weight versions."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

import numpy as np

from megatron_fipo.batching.trajectory import VersionSpan
from megatron_fipo.engine.protocol import (
    NO_LOG_PROBS,
    NO_TOKENS,
    Generation,
    GenerationRequest,
    SamplingParams,
)
from megatron_fipo.scorer.protocol import FinishedResponse, Range, ScoreRequest, sampled_tokens
from megatron_fipo.tasks.task import Problem, Score


@dataclass(frozen=True, eq=False)
class GroupRequest:
    """Responses to one problem that are to be sampled."""

    problem: Problem
    requests: Sequence[GenerationRequest]
    sampling: SamplingParams


@dataclass(frozen=True, eq=False)
class EpisodeRequest(GenerationRequest):
    """One response to a problem with an environment."""

    problem: Problem = field(kw_only=True)
    observations: tuple[Range, ...] = field(kw_only=True, default=())
    """Those of `prefix`."""


@dataclass(frozen=True, eq=False)
class EpisodeGeneration(Generation):
    """All that turns and observations added to a response. Log-probs of observations are 0."""

    observations: tuple[Range, ...] = field(kw_only=True)
    """Those among them, as positions in the complete response."""
    score: Score | None = field(kw_only=True)
    """The environment's own."""

    @property
    def sampled_tokens(self) -> int:
        return sampled_tokens(len(self.response_ids), self.observations)


@dataclass(frozen=True)
class RequestResult:
    """The result of a request."""

    request_id: str
    generation: Generation | None
    """None: failed `max_retries + 1` times, or its environment did; never scored."""
    environment_failed: bool = False

    @property
    def sampled_tokens(self) -> int:
        return 0 if self.generation is None else self.generation.sampled_tokens


class RequestPool(Protocol):
    """What answers requests: `pool.EnginePool`, or `episode_pool.EpisodePool` in front of it."""

    @property
    def outstanding(self) -> int:
        """Requests submitted and not yet returned with a result."""

    def submit(self, requests: Sequence[GenerationRequest], sampling: SamplingParams) -> None: ...

    def poll(self, timeout_s: float) -> list[RequestResult]: ...

    def abort(self) -> list[RequestResult]: ...


def generation_request(
    problem: Problem,
    request_id: str,
    seed: int,
    prefix: np.ndarray = NO_TOKENS,
    observations: tuple[Range, ...] = (),
    routed: int = 0,
) -> GenerationRequest:
    """A request for one response to the problem; one with an environment is an episode."""
    if problem.task.environment:
        return EpisodeRequest(
            request_id, problem.prompt_ids, seed, prefix, routed, problem=problem, observations=observations
        )
    return GenerationRequest(request_id, problem.prompt_ids, seed, prefix, routed)


def answer_groups(
    pool: RequestPool,
    groups: Iterable[GroupRequest],
    timeout_s: float,
    meanwhile: Callable[[], object] = lambda: None,
) -> list[Generation | None]:
    """Answer the requests of all groups, in order; None for one that failed permanently. No other may be outstanding.

    Neighbours with equal sampling are submitted together, so that they share calls. `meanwhile` is called about every
    `timeout_s` and may raise.
    """
    groups = list(groups)
    for sampling, same in groupby(groups, key=lambda group: group.sampling):
        pool.submit([request for group in same for request in group.requests], sampling)
    answers: dict[str, Generation | None] = {}
    while pool.outstanding:
        answers |= {result.request_id: result.generation for result in pool.poll(timeout_s)}
        meanwhile()
    return [answers[request.request_id] for group in groups for request in group.requests]


def request_seed(seed: int, request_id: str) -> int:
    """A seed in [0, 2^63) that depends only on the run's seed and the request's id."""
    return (
        int.from_bytes(hashlib.blake2b(f"{seed}|{request_id}".encode(), digest_size=8).digest(), "big") >> 1
    )


def joined_routes(parts: Iterable[np.ndarray | None]) -> np.ndarray | None:
    """The routes of several calls, one after another. One array is not copied."""
    known = [part for part in parts if part is not None]
    return None if not known else known[0] if len(known) == 1 else np.concatenate(known)


@dataclass(eq=False)
class Response:
    """The tokens of one response so far."""

    token_ids: np.ndarray = field(default_factory=lambda: NO_TOKENS)
    """int32."""
    log_probs: np.ndarray = field(default_factory=lambda: NO_LOG_PROBS)
    """float32, of these tokens."""
    spans: list[VersionSpan] = field(default_factory=list)
    """Which weight version sampled which tokens; adjacent spans differ in version."""
    finish_reason: str | None = None
    """`stop` or `length`; None while the response is unfinished."""
    observations: tuple[Range, ...] = ()
    """The tokens that an environment gave, rising; all others were sampled."""
    score: Score | None = None
    """The environment's own, of a finished response."""
    routes: np.ndarray | None = None
    """As `Trajectory.routes`."""

    @property
    def sampled_tokens(self) -> int:
        return sampled_tokens(len(self.token_ids), self.observations)

    @property
    def mask(self) -> np.ndarray:
        """int8 [tokens]: 1 for sampled tokens, 0 for those of an environment."""
        mask = np.ones(len(self.token_ids), dtype=np.int8)
        for start, end in self.observations:
            mask[start:end] = 0
        return mask

    @classmethod
    def of(cls, generation: Generation) -> "Response":
        """The response of one call."""
        response = cls()
        response.add(generation)
        return response

    def to_score(self) -> FinishedResponse:
        """What a reward reads of a finished response."""
        assert self.finish_reason is not None
        return FinishedResponse(self.token_ids, self.finish_reason, self.observations, self.score)

    def add(self, generation: Generation) -> None:
        """Append the tokens that one call gave. A response of one call keeps the call's arrays, uncopied."""
        start, version = len(self.token_ids), generation.weight_version
        if start:
            self.token_ids = np.concatenate([self.token_ids, generation.response_ids])
            self.log_probs = np.concatenate([self.log_probs, generation.log_probs])
        else:
            self.token_ids, self.log_probs = generation.response_ids, generation.log_probs
        self.routes = joined_routes([self.routes, generation.routes])
        end = len(self.token_ids)
        if self.spans and self.spans[-1].version == version:
            self.spans[-1].end = end
        elif end > start:
            self.spans.append(VersionSpan(version, start, end))
        if generation.finish_reason != "abort":
            self.finish_reason = generation.finish_reason
        if isinstance(generation, EpisodeGeneration):
            self.observations, self.score = self.observations + generation.observations, generation.score


@dataclass
class PromptGroup:
    """A prompt and its responses so far. `serial` counts the prompts of a run in the order of the dataset."""

    serial: int
    problem: Problem
    responses: list[Response]

    @property
    def group_id(self) -> str:
        return f"{self.serial}-{self.problem.problem_id}"

    @property
    def finished(self) -> bool:
        return all(response.finish_reason is not None for response in self.responses)

    @property
    def tokens(self) -> int:
        """Response tokens sampled so far."""
        return sum(response.sampled_tokens for response in self.responses)

    @property
    def oldest_version(self) -> int | None:
        """The oldest weight version that sampled one of its tokens; None if there is no token yet."""
        return min((response.spans[0].version for response in self.responses if response.spans), default=None)

    def requests(self, seed: int) -> list[GenerationRequest]:
        """Requests for the unfinished responses.

        A request's seed depends only on the run's `seed`, the serial, the prompt and the index of the
        response.
        """
        return [
            generation_request(
                self.problem,
                request_id := f"{self.group_id}/{index}",
                request_seed(seed, request_id),
                response.token_ids,
                response.observations,
                0 if response.routes is None else len(response.routes),
            )
            for index, response in enumerate(self.responses)
            if response.finish_reason is None
        ]

    def score_request(self) -> ScoreRequest:
        """The request to score the group, under its serial. Raises `ValueError` if a response is unfinished."""
        responses = []
        for response in self.responses:
            if response.finish_reason is None:
                raise ValueError(f"group {self.group_id} has an unfinished response and can't be scored")
            responses.append(response.to_score())
        return ScoreRequest(self.serial, self.problem, tuple(responses))


def parse_request_id(request_id: str) -> tuple[int, int]:
    """Serial of the group and index of the response that a request of `PromptGroup.requests` is for."""
    return int(request_id.partition("-")[0]), int(request_id.rpartition("/")[2])
