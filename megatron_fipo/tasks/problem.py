"""A prompt with its verifiable answer."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One row of a dataset, already tokenised.

    `ground_truth` is what the reward compares with; `data_source` may select among several scorers.
    """

    problem_id: str
    prompt_ids: tuple[int, ...]
    prompt_text: str
    ground_truth: str
    data_source: str
    extra: dict[str, Any] = field(default_factory=dict)
