"""What a task consists of: problems from a data source, and a reward function for the responses."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_fipo.config import Config
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
class TaskSettings:
    """How the responses to a problem are sampled and scored, by the set that the problem is from."""

    set_name: str = ""
    """Name in `data.sets` or `evaluation.sets`; empty for problems of `data.train_path` and generated ones."""
    reward: str = ""
    """A sum of rewards, as `reward.name`."""
    max_response_length: int = 0
    """Longest response in tokens; 0 for that of the run."""
    environment: str = ""
    """Import path of what answers the policy between turns; empty for a single turn."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt, tokenized, with its verifiable answer.

    `ground_truth` is what the reward function compares with; `data_source` may select the reward.
    """

    problem_id: str
    prompt_ids: tuple[int, ...]
    prompt_text: str
    ground_truth: str
    data_source: str
    row_digest: str = ""
    """Identifies the row of its file by content; empty for a generated problem, which its id identifies."""
    columns: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """All columns of its row whose values are texts, numbers, lists and objects, as the file has them."""
    task: TaskSettings = TaskSettings()


@dataclass(frozen=True)
class Turn:
    """What the policy wrote until it stopped, and what the environment answered."""

    response: str
    observation: str
    """Empty after the last turn."""


@dataclass(frozen=True, eq=False)
class Completion:
    """A finished response to a problem: the argument of a reward function."""

    problem: Problem
    text: str
    """Decoded without special tokens; of a reward with `reads_last` the end alone."""
    token_ids: NDArray[np.int32]
    """1-D, with the end-of-sequence token."""
    finish_reason: str
    """`stop`, or `length` at the response limit."""
    turns: tuple[Turn, ...] = ()
    """The turns of an episode in an environment; empty without one."""


@dataclass(frozen=True)
class Score:
    """The result for one response.

    `reward` is used for the advantage, `accuracy` (0 or 1) for dynamic sampling and evaluation, `answer` for
    the majority vote. A finite number in `extra` is a metric, `reward/NAME` and `evaluation/SET/NAME`: the mean over the
    responses that have it. Its name has at most 40 letters, digits and _, a letter first.
    """

    reward: float
    accuracy: float
    answer: str = NO_ANSWER
    extra: dict[str, Any] = field(default_factory=dict)


RewardFunction = Callable[[Completion], "float | Score"]
"""A function of the response alone. A number is the reward, and counts as accurate if it is above 0."""
GroupFunction = Callable[[Sequence[Completion]], "Sequence[float | Score]"]
"""A reward function of all responses to one problem at once, in order."""


@dataclass(frozen=True)
class Reward:
    """A reward function, the problems that it can score, and the part of a response that it reads."""

    score: RewardFunction | None
    """None if there is `score_group`."""
    obstacle: Callable[[Problem], str | None] = lambda _: None
    """Why no response can be right for a problem, as the end of a sentence about its ground truth; None if one can."""
    doubt: Callable[[Problem], str | None] = lambda _: None
    """What in a ground truth makes a right response look wrong, as a noun; None if nothing does."""
    reads_last: int | None = None
    """Last characters of the response on which the score depends; the reward function gets no others. None: all."""
    score_group: GroupFunction | None = None
    """Scores all responses to a problem in one call, for rewards that batch."""
    reads_columns: bool = True
    """Whether it reads `Problem.columns`; they are empty if no reward of a set does."""
    prepare: Callable[[], None] = lambda: None
    """Called once in each scorer before it scores. Raises `UserError` if the reward cannot work there."""
    take_retries: Callable[[], int] = lambda: 0
    """Requests that were sent again since the last call, of a reward that asks a server."""


class UnavailableError(Exception):
    """A reward function raises it if what it needs cannot be reached, such as a judge: the group is then not scored at all.

    The message is a clause that says what was tried.
    """


class PromptTooLongError(UserError):
    """A prompt of `tokens` tokens is above the limit."""

    def __init__(self, where: str, prompt_ids: tuple[int, ...], limit: int) -> None:
        super().__init__(
            f"{where} has a prompt of {len(prompt_ids)} tokens, above rollout.max_prompt_length = {limit}; raise the "
            "limit, remove the prompt, or set data.overlong_prompts=drop or truncate_left"
        )
        self.prompt_ids = prompt_ids
        """All of its tokens."""

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids)


class EncodePrompt(Protocol):
    """Returns a prompt's text and token ids. `where` names the prompt in errors."""

    @property
    def has_chat_template(self) -> bool:
        """Whether messages keep their roles; if not, a message of the user is its content."""

    @property
    def wraps_texts(self) -> bool:
        """Whether a plain text becomes a message of the user."""

    def __call__(self, where: str, prompt: Prompt) -> tuple[str, tuple[int, ...]]: ...

    def truncated(self, prompt_ids: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        """The end of a prompt above the limit, as much as fits."""


HeldOut = dict[str, list[Problem]]
"""The problems of each evaluation set by its name; empty if nothing is evaluated."""


@dataclass(frozen=True)
class DataSource:
    """A task that generates its problems. `Log` receives what was excluded."""

    training: Callable[[Config, EncodePrompt, Log], list[Problem]]
    held_out: Callable[[Config, EncodePrompt, Log], HeldOut]
