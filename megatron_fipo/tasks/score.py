"""What a scorer returns and what it is given."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_fipo.tasks.problem import Problem

NO_ANSWER = "[INVALID]"
"""`Score.answer` of a response from which no answer could be extracted; it has no vote in cons@k."""


@dataclass(frozen=True)
class Score:
    """`reward` feeds the advantage, `accuracy` (0 or 1) feeds dynamic sampling and evaluation, `answer` the majority vote."""

    reward: float
    accuracy: float
    answer: str
    extra: dict[str, Any] = field(default_factory=dict)


class Scorer(Protocol):
    """A pure function of the response (decoded without special tokens); it must not raise on any text."""

    def __call__(self, response_text: str, problem: Problem, finish_reason: str) -> Score: ...
