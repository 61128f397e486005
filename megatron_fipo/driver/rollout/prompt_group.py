"""The responses to one prompt: tokens of several calls and weight versions, saving, and scoring."""

import hashlib
from dataclasses import dataclass, field

import numpy as np

from megatron_fipo.batching.trajectory import Trajectory, VersionSpan
from megatron_fipo.engine.protocol import NO_LOG_PROBS, NO_TOKENS, Generation, GenerationRequest
from megatron_fipo.objective.advantages import overlong_penalty
from megatron_fipo.tasks.task import Decode, Problem, Scorer

ScoredGroup = list[Trajectory]
"""The scored responses to one prompt, in the order of their indices."""


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


def parse_request_id(request_id: str) -> tuple[int, int]:
    """Serial of the group and index of the response that a request of `PromptGroup.requests` is for."""
    return int(request_id.partition("-")[0]), int(request_id.rpartition("/")[2])


@dataclass(frozen=True)
class GroupScorer:
    """Turns a finished group into scored trajectories."""

    scorer: Scorer
    decode: Decode
    max_response_length: int
    overlong_buffer: int
    overlong_factor: float

    def __call__(self, group: PromptGroup) -> ScoredGroup:
        """`reward` is the score plus the overlong penalty; `accuracy` is the score's own."""
        prompt_ids = np.array(group.problem.prompt_ids, dtype=np.int32)
        return [self._trajectory(group, prompt_ids, response) for response in group.responses]

    def _trajectory(self, group: PromptGroup, prompt_ids: np.ndarray, response: Response) -> Trajectory:
        if response.finish_reason is None:
            raise ValueError(f"group {group.group_id} has an unfinished response and can't be scored")
        length = len(response.token_ids)
        score = self.scorer(self.decode(response.token_ids), group.problem, response.finish_reason)
        penalty = float(
            overlong_penalty(length, self.max_response_length, self.overlong_buffer, self.overlong_factor)
        )
        return Trajectory(
            group_id=group.group_id,
            prompt_ids=prompt_ids,
            response_ids=response.token_ids,
            response_mask=np.ones(length, dtype=np.int8),
            rollout_log_probs=response.log_probs,
            spans=response.spans,
            finish_reason=response.finish_reason,
            reward=score.reward + penalty,
            accuracy=score.accuracy,
            extra={"problem_id": group.problem.problem_id, "answer": score.answer, **score.extra},
        )
