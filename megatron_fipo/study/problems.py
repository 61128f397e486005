"""Accuracy and length of each held-out problem of a run."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_fipo.study.evaluations import Problem, Response
from megatron_fipo.study.results import ACCURACY, LENGTH, Measure

BY_PROBLEM = (ACCURACY, LENGTH)
"""The measures that have a value for each problem."""


@dataclass(frozen=True)
class ProblemValues:
    """Means over the responses to each problem of one evaluation."""

    accuracy: dict[Problem, float]
    length: dict[Problem, float]

    def of(self, measure: Measure) -> dict[Problem, float]:
        """KeyError for a measure that is not in `BY_PROBLEM`."""
        return {ACCURACY: self.accuracy, LENGTH: self.length}[measure]


def problem_values(responses: Sequence[Response]) -> ProblemValues:
    """The means of an evaluation, by problem in the order of the responses."""
    right: dict[Problem, list[float]] = {}
    lengths: dict[Problem, list[float]] = {}
    for response in responses:
        right.setdefault(response.problem, []).append(float(response.right))
        lengths.setdefault(response.problem, []).append(response.length)
    return ProblemValues(
        *({key: sum(all_) / len(all_) for key, all_ in part.items()} for part in (right, lengths))
    )
