"""What an environment is: it answers the policy between turns, with the output of a tool or the next message of a user."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_fipo.tasks.task import Problem, Score, Turn

SINGLE_TURN = "single_turn"
"""`environment.name` of problems without an environment."""

Observation = str | Sequence[Mapping[str, str]] | Sequence[int]
"""What the policy reads next: a text that is encoded as it is, messages (role, content) as the chat template writes them after
an assistant's message, or token ids."""


@dataclass(frozen=True)
class Done:
    """The episode ends after this turn."""

    score: float | Score | None = None
    """The score of the response. None: the problem's reward scores it."""


@dataclass(frozen=True)
class Episode:
    """The response to a problem so far. It ends with a turn of the policy."""

    problem: Problem
    turns: tuple[Turn, ...]
    """At least one. The last has no observation yet."""

    @property
    def response(self) -> str:
        """What the policy wrote in this turn, stop strings included, without special tokens."""
        return self.turns[-1].response

    @property
    def text(self) -> str:
        """All turns and observations, one after another."""
        return "".join(turn.response + turn.observation for turn in self.turns)


Step = Callable[[Episode], "Observation | Done | None"]
"""An environment without a state: the answer to the last turn. None ends the episode, as `Done()` does."""


class Environment(Protocol):
    """An environment with a state: a class without arguments, of which each response has an instance.

    An instance that was lost is made again: `reset`, then `step` for each turn so far, whose answers are ignored.
    """

    def reset(self, problem: Problem) -> None:
        """Begin an episode."""

    def step(self, episode: Episode) -> "Observation | Done | None":
        """The answer to the last turn. None ends the episode, as `Done()` does."""
