"""The result of one rollout: the unit of data between sampling and packing."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class VersionSpan:
    """Tokens `start` to `end` (exclusive) of a response were sampled by weights of `version`."""

    version: int
    start: int
    end: int


def covers(spans: Sequence[VersionSpan], length: int) -> bool:
    """Whether the spans follow one another from the first to the last of `length` tokens."""
    starts, ends = [span.start for span in spans], [span.end for span in spans]
    return [*starts, length] == [0, *ends]


@dataclass(eq=False)
class Trajectory:
    """One response to one prompt, with the results of sampling and scoring.

    `response_ids`, `response_mask` and `rollout_log_probs` have the same length: the response, including its
    end-of-sequence token. Tokens are numpy arrays, 9 bytes per response token; other sequences are converted.
    Arrays may be read-only views of Ray's object store.
    """

    group_id: str
    """Shared by the responses to the same prompt in the same iteration. Advantages are relative to the
    group."""
    prompt_ids: np.ndarray
    """int32."""
    response_ids: np.ndarray
    """int32 [response length]."""
    response_mask: np.ndarray
    """int8 [response length]: 1 for tokens sampled from the policy, 0 for tool output. FutureKL decays over the
    zeros too."""
    rollout_log_probs: np.ndarray
    """float32 [response length]: natural-log probability under the rollout engine. A health metric, never used
    as the loss's old log-probs."""
    spans: list[VersionSpan]
    """Which weights sampled which tokens. Covers the response without gaps: tool output belongs to the span before it."""
    finish_reason: str
    """`stop` (end-of-sequence token seen) or `length` (cut at the response limit)."""
    reward: float = 0.0
    """Input of the advantage: the reward function's value plus the overlong penalty."""
    accuracy: float = 0.0
    """Input of dynamic sampling and evaluation: correct (1.0) or wrong (0.0), before shaping."""
    advantage: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)
    """Additional values that the reward logs, such as the extracted answer."""
    set_name: str = ""
    """Of the problem, in `data.sets`; empty if it is from none."""
    routes: np.ndarray | None = None
    """uint8 or uint16 [tokens, layers, k]: the experts that the rollout engine used for the first tokens of prompt and
    response, by the weights that sampled the token after them; None if it reported none. In layers without experts undefined.
    layers · k bytes per token: 384 for Qwen3-30B-A3B."""

    def __post_init__(self) -> None:
        self.prompt_ids = np.asarray(self.prompt_ids, dtype=np.int32)
        self.response_ids = np.asarray(self.response_ids, dtype=np.int32)
        self.response_mask = np.asarray(self.response_mask, dtype=np.int8)
        self.rollout_log_probs = np.asarray(self.rollout_log_probs, dtype=np.float32)

    @property
    def oldest_version(self) -> int:
        """Version of the weights that sampled the first token. Versions never decrease along a response."""
        return self.spans[0].version

    @property
    def length(self) -> int:
        """Tokens of prompt and response together."""
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def response_length(self) -> int:
        return len(self.response_ids)

    @property
    def sampled_tokens(self) -> int:
        """Response tokens that were sampled from the policy."""
        return int(self.response_mask.sum())

    @property
    def turns(self) -> int:
        """Turns of the policy: runs of sampled tokens. A finished response ends with one."""
        return 1 + int(np.count_nonzero(np.diff(self.response_mask) < 0))
