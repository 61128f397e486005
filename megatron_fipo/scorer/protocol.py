"""The interface between the driver and a scorer. Imported by the driver: no torch here."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_fipo.config import Config, RewardConfig
from megatron_fipo.field_rules import sum_terms
from megatron_fipo.tasks.task import Problem, Score

START_TIMEOUT_S = 600.0
"""Seconds a scorer may take to load."""
GRACE_S = 15.0
"""Seconds that a call may take in addition to the time limits of its responses."""
Range = tuple[int, int]
"""Start and end (exclusive) of tokens in a response."""


def sampled_tokens(length: int, observations: Iterable[Range]) -> int:
    """Of `length` tokens those that were sampled, not given by an environment."""
    return length - sum(end - start for start, end in observations)


@dataclass(frozen=True)
class ScorerSettings:
    """What a scorer needs to load and to score."""

    model_path: str
    """Folder with the tokenizer, an absolute path."""
    trust_remote_code: bool
    rewards: tuple[str, ...]
    """All that problems name, each a sum as `reward.name` writes it."""
    hook_folder: str
    """Also searched for the modules of rewards that are import paths; an absolute path."""
    reward: RewardConfig
    """Limits, and settings of built-in rewards."""

    @classmethod
    def of(cls, config: Config, model_path: str, rewards: tuple[str, ...]) -> "ScorerSettings":
        """Those for responses of the model in `model_path`, with modules in the folder of the command."""
        path = str(Path(model_path).resolve())
        return cls(path, config.model.trust_remote_code, rewards, os.getcwd(), config.reward)


@dataclass(frozen=True, eq=False)
class FinishedResponse:
    """One response to score."""

    token_ids: NDArray[np.int32]
    """1-D."""
    finish_reason: str
    """`stop` or `length`."""
    observations: tuple[Range, ...] = ()
    """The tokens that an environment gave, rising."""
    score: Score | None = None
    """The environment's own, which takes the place of the reward's."""

    @property
    def sampled_tokens(self) -> int:
        return sampled_tokens(len(self.token_ids), self.observations)


@dataclass(frozen=True, eq=False)
class ScoreRequest:
    """The responses of one group, scored by one call."""

    key: int
    """Names the request in its result."""
    problem: Problem
    responses: tuple[FinishedResponse, ...]

    place: ClassVar[None] = None
    """Any scorer may have it."""
    attempts: ClassVar[int] = 2
    """Calls that it may have."""

    @property
    def calls(self) -> int:
        """Results of reward functions that it needs: one for each term of the reward and each response."""
        return len(self.responses) * len(sum_terms(self.problem.task.reward))

    def __str__(self) -> str:
        return f" ({self.problem.task.reward}) with the responses to problem {self.problem.problem_id}"


class FailureKind(Enum):
    """Why a group has no scores."""

    RAISED = "raised"
    """The reward function raised an exception."""
    RESULT = "result"
    """It returned something that is no usable `Score`."""
    TIME = "time"
    """A response took longer than `timeout_s`."""
    MEMORY = "memory"
    """A response needed more than `memory_mb`."""
    UNAVAILABLE = "unavailable"
    """The reward function could not reach what it needs."""
    HUNG = "hung"
    """The scorer did not answer: code that no Python signal interrupts."""
    DIED = "died"
    """The scorer's process ended."""

    @property
    def repeatable(self) -> bool:
        """Whether a second attempt would fail in the same way: the reward is a pure function, or has retried by itself."""
        return self in (FailureKind.RAISED, FailureKind.RESULT, FailureKind.UNAVAILABLE)


@dataclass(frozen=True)
class Failure:
    """A response of a group that could not be scored; the group is then not used."""

    kind: FailureKind
    reason: str
    """A clause that names the reward function, the problem and, if it is known, the response (from 1)."""
    trace: str = ""
    """The traceback of the reward function's own code, if it raised."""


class Scorer(Protocol):
    """A scorer. Its methods run one at a time, in the main thread of the process."""

    def ready(self) -> None:
        """Return once tokenizer and rewards are loaded. Raises `UserError` if they can't be."""

    def score(self, request: ScoreRequest) -> "list[Score] | Failure":
        """The scores in the order of the responses, or the first failure.

        Takes at most about `timeout_s` per response, except in code that Python signals do not interrupt.
        """

    def score_and_count(self, request: ScoreRequest) -> "tuple[list[Score] | Failure, int]":
        """The result of `score`, and how many requests to servers were sent again for it."""
