"""The responses to one prompt: tokens of several calls and weight versions."""

import hashlib
from dataclasses import dataclass, field

import numpy as np

from megatron_fipo.batching.trajectory import VersionSpan
from megatron_fipo.engine.protocol import NO_LOG_PROBS, NO_TOKENS, Generation, GenerationRequest
from megatron_fipo.scorer.protocol import FinishedResponse, ScoreRequest
from megatron_fipo.tasks.task import Problem


def request_seed(seed: int, request_id: str) -> int:
    """A seed in [0, 2^63) that depends only on the run's seed and the request's id."""
    return (
        int.from_bytes(hashlib.blake2b(f"{seed}|{request_id}".encode(), digest_size=8).digest(), "big") >> 1
    )


@dataclass(eq=False)
class Response:
    """The tokens sampled for one response so far."""

    token_ids: np.ndarray = field(default_factory=lambda: NO_TOKENS)
    """int32."""
    log_probs: np.ndarray = field(default_factory=lambda: NO_LOG_PROBS)
    """float32, of these tokens."""
    spans: list[VersionSpan] = field(default_factory=list)
    """Which weight version sampled which tokens; adjacent spans differ in version."""
    finish_reason: str | None = None
    """`stop` or `length`; None while the response is unfinished."""

    def add(self, generation: Generation) -> None:
        """Append the tokens that one call sampled. A response of one call keeps the call's arrays, uncopied."""
        start, version = len(self.token_ids), generation.weight_version
        if start:
            self.token_ids = np.concatenate([self.token_ids, generation.response_ids])
            self.log_probs = np.concatenate([self.log_probs, generation.log_probs])
        else:
            self.token_ids, self.log_probs = generation.response_ids, generation.log_probs
        end = len(self.token_ids)
        if self.spans and self.spans[-1].version == version:
            self.spans[-1].end = end
        elif end > start:
            self.spans.append(VersionSpan(version, start, end))
        if generation.finish_reason != "abort":
            self.finish_reason = generation.finish_reason


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
        return sum(len(response.token_ids) for response in self.responses)

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
            GenerationRequest(
                request_id := f"{self.group_id}/{index}",
                self.problem.prompt_ids,
                request_seed(seed, request_id),
                response.token_ids,
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
            responses.append(FinishedResponse(response.token_ids, response.finish_reason))
        return ScoreRequest(self.serial, self.problem, tuple(responses))


def parse_request_id(request_id: str) -> tuple[int, int]:
    """Serial of the group and index of the response that a request of `PromptGroup.requests` is for."""
    return int(request_id.partition("-")[0]), int(request_id.rpartition("/")[2])
