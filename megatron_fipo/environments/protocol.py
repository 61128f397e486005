"""The interface between the driver and a process with environments. Imported by the driver: no torch here."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_fipo.engine.protocol import NO_TOKENS
from megatron_fipo.scorer.protocol import Failure
from megatron_fipo.tasks.task import Problem, Score

MAX_ATTEMPTS = 2
"""Calls for a turn that is sent alone, and answers to one that an environment may fail in one call."""


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker needs to load, and its limits."""

    model_path: str
    """Folder with the tokenizer, an absolute path."""
    trust_remote_code: bool
    samples: dict[str, Problem]
    """Import paths of all environments that problems name, each with a problem to try it with."""
    hook_folder: str
    """Also searched for their modules; an absolute path."""
    max_observation_tokens: int
    timeout_s: float
    """Of one `reset` or `step`."""
    memory_mb: int
    """Above what the process uses once it has loaded."""


@dataclass(frozen=True, eq=False)
class TurnRequest:
    """A response whose last turn is to be answered."""

    episode_id: str
    problem: Problem
    token_ids: NDArray[np.int32]
    """1-D, the response so far. Its last token was sampled."""
    observations: tuple[tuple[int, int], ...]
    """Ranges (start, end) of `token_ids` that environments gave, rising."""
    space: int
    """Longest observation, in tokens, after which the policy may write at least one more; 0 if no further turn is allowed."""

    @property
    def calls(self) -> int:
        """Calls of the environment that it may need: `reset` and one `step` for each turn."""
        return len(self.observations) + 2

    def worker(self, workers: int) -> int:
        """The worker of the episode: the same for all of its turns."""
        return zlib.crc32(self.episode_id.encode()) % workers


@dataclass(frozen=True, eq=False)
class TurnAnswer:
    """What follows a turn."""

    finish_reason: str | None
    """`stop`: the environment ended the episode. `length`: it did not, but no further turn has space. None: it continues."""
    observation: NDArray[np.int32] = field(default_factory=lambda: NO_TOKENS)
    """1-D, at least one token if the episode continues, else empty."""
    score: Score | None = None
    """Only with `stop`: the environment's own."""
    truncated: bool = False
    """Whether the observation was longer than `max_observation_tokens`."""


@dataclass(frozen=True, eq=False)
class TurnsRequest:
    """Turns of several episodes of one worker, answered by one call."""

    key: int
    """Names the request in its result."""
    turns: tuple[TurnRequest, ...]
    place: int
    """The worker."""
    attempts: int
    """Calls that it may have."""

    @property
    def calls(self) -> int:
        return sum(turn.calls for turn in self.turns)

    def __str__(self) -> str:
        first = self.turns[0].problem
        more = f" and {len(self.turns) - 1} others" if len(self.turns) > 1 else ""
        return f" ({first.task.environment}) with a response to problem {first.problem_id}{more}"


Answers = Sequence[TurnAnswer | Failure]
"""By turn. A failure is final: the environment failed twice."""


class EnvironmentWorker(Protocol):
    """A process with environments. Its methods run one at a time, in the main thread of the process."""

    def ready(self) -> None:
        """Return once tokenizer and environments are loaded and each has answered one turn. Raises `UserError` if one can't."""

    def answer(self, request: TurnsRequest) -> "Answers | Failure":
        """The answers in the order of the turns, or a failure after which the process must be replaced."""
