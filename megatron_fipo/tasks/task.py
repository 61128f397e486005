"""What a task consists of: problems from a data source, and a reward function for the responses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from megatron_fipo.config import DataConfig
from megatron_fipo.errors import UserError

NO_ANSWER = "[INVALID]"
"""`Score.answer` of a response from which no answer could be extracted; it has no vote in cons@k."""

Prompt = str | tuple[tuple[str, str], ...]
"""A text that is used without changes, or (role, content) messages."""
Decode = Callable[[Sequence[int] | np.ndarray], str]
"""Token ids to text without special tokens."""
Log = Callable[[str], None]
"""Receives one sentence for the user."""


@dataclass(frozen=True)
class Problem:
    """A prompt, tokenized, with its verifiable answer.

    `ground_truth` is what the reward function compares with; `data_source` may select among several of them.
    """

    problem_id: str
    prompt_ids: tuple[int, ...]
    prompt_text: str
    ground_truth: str
    data_source: str
    row_digest: str = ""
    """Identifies the row of its file by content; empty for a generated problem, which its id identifies."""


@dataclass(frozen=True)
class Score:
    """The result for one response.

    `reward` is used for the advantage, `accuracy` (0 or 1) for dynamic sampling and evaluation, `answer` for
    the majority vote.
    """

    reward: float
    accuracy: float
    answer: str
    extra: dict[str, Any] = field(default_factory=dict)


class RewardFunction(Protocol):
    """A pure function of the response (decoded without special tokens); it must not raise on any text."""

    def __call__(self, response_text: str, problem: Problem, finish_reason: str) -> Score: ...


@dataclass(frozen=True)
class Reward:
    """A reward function, the answers that it can compare with, and the part of a response that it reads."""

    score: RewardFunction
    obstacle: Callable[[str], str | None]
    """Why no response can be right for a ground truth, as the end of a sentence; None if one can."""
    doubt: Callable[[str], str | None] = lambda _: None
    """What in a ground truth makes a right response look wrong, as a noun; None if nothing does."""
    reads_last: int | None = None
    """Last characters of the response on which the score depends; the reward function gets no others. None: all."""


class PromptTooLongError(UserError):
    """A prompt of `tokens` tokens is above the limit."""

    def __init__(self, where: str, tokens: int, limit: int) -> None:
        super().__init__(
            f"{where} has a prompt of {tokens} tokens, above rollout.max_prompt_length = {limit}; raise the "
            "limit or remove the prompt"
        )
        self.tokens = tokens


class EncodePrompt(Protocol):
    """Returns a prompt's text and token ids. `where` names the prompt in errors."""

    @property
    def has_chat_template(self) -> bool:
        """Whether messages keep their roles; if not, a message of the user is its content."""

    def __call__(self, where: str, prompt: Prompt) -> tuple[str, tuple[int, ...]]: ...


class DataSource(Protocol):
    """Returns the problems for training, or the held-out ones. `log` receives what was excluded."""

    def __call__(
        self, config: DataConfig, encode: EncodePrompt, *, held_out: bool, seed: int, log: Log
    ) -> list[Problem]: ...
