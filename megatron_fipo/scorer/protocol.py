"""The interface between the driver and a scorer. Imported by the driver: no torch here."""

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_fipo.tasks.task import Problem, Score


@dataclass(frozen=True)
class ScorerSettings:
    """What a scorer needs to load, and its limits for one response."""

    model_path: str
    """Folder with the tokenizer, an absolute path."""
    trust_remote_code: bool
    reward_name: str
    timeout_s: float
    memory_mb: int
    """Above what the process uses once it has loaded."""


@dataclass(frozen=True, eq=False)
class FinishedResponse:
    """One response to score."""

    token_ids: NDArray[np.int32]
    """1-D."""
    finish_reason: str
    """`stop` or `length`."""


@dataclass(frozen=True, eq=False)
class ScoreRequest:
    """The responses of one group, scored by one call."""

    key: int
    """Names the request in its result."""
    problem: Problem
    responses: tuple[FinishedResponse, ...]


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
    HUNG = "hung"
    """The scorer did not answer: code that no Python signal interrupts."""
    DIED = "died"
    """The scorer's process ended."""

    @property
    def repeatable(self) -> bool:
        """Whether a second attempt would fail in the same way: the reward is a pure function."""
        return self in (FailureKind.RAISED, FailureKind.RESULT)


@dataclass(frozen=True)
class Failure:
    """A response of a group that could not be scored; the group is then not used."""

    kind: FailureKind
    reason: str
    """A clause that names the reward function, the problem and, if it is known, the response (from 1)."""


class Scorer(Protocol):
    """A scorer. Its methods run one at a time, in the main thread of the process."""

    def ready(self) -> None:
        """Return once tokenizer and reward are loaded. Raises `UserError` if they can't be."""

    def score(self, request: ScoreRequest) -> "list[Score] | Failure":
        """The scores in the order of the responses, or the first failure.

        Takes at most about `timeout_s` per response, except in code that Python signals do not interrupt.
        """
