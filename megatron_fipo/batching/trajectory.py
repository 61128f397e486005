"""What one rollout leaves behind: the unit that everything between sampling and packing passes around."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class VersionSpan:
    """Tokens `start` to `end` (exclusive) of a response were sampled by weights of `version`."""

    version: int
    start: int
    end: int


@dataclass
class Trajectory:
    """One response to one prompt, with what sampling and scoring learnt about it.

    `response_ids`, `response_mask`, `rollout_log_probs` have the same length: the response, its end-of-sequence token included.
    """

    group_id: str
    """Responses to the same prompt in the same iteration share it; advantages are relative to the group."""
    prompt_ids: list[int]
    response_ids: list[int]
    response_mask: list[int]
    """1 where the policy chose the token, 0 where a tool did. FutureKL still decays over the zeros."""
    rollout_log_probs: list[float]
    """Natural-log probability under the rollout engine. A health metric; never the loss's old log-probs."""
    spans: list[VersionSpan]
    """Which weights sampled which tokens; covers the response without gaps."""
    finish_reason: str
    """`stop` (end-of-sequence token seen) or `length` (cut at the response limit)."""
    reward: float = 0.0
    """What the advantage is computed from: the scorer's value plus the overlong penalty."""
    accuracy: float = 0.0
    """What dynamic sampling and evaluation look at: right (1.0) or wrong (0.0), before shaping."""
    advantage: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)
    """Whatever the reward wants logged, e.g. the extracted answer."""

    @property
    def oldest_version(self) -> int:
        """Version of the weights that sampled the first token; versions never fall along a response."""
        return self.spans[0].version

    @property
    def length(self) -> int:
        """Tokens of prompt and response together."""
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def response_length(self) -> int:
        return len(self.response_ids)
