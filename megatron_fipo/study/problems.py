"""Accuracy and length of each held-out problem of a run."""

from collections.abc import Iterable
from statistics import fmean

from megatron_fipo.study.evaluations import Problem, Response
from megatron_fipo.study.results import ACCURACY, LENGTH, Measure

BY_PROBLEM = (ACCURACY, LENGTH)
"""The measures that have a value for each problem."""
ProblemValues = dict[Measure, dict[Problem, float]]
"""Of each of them, the mean over the responses to each problem of one evaluation."""


def problem_values(responses: Iterable[Response]) -> ProblemValues:
    """The means of an evaluation; without problems if there are no responses."""
    right: dict[Problem, list[float]] = {}
    lengths: dict[Problem, list[float]] = {}
    for response in responses:
        right.setdefault(response.problem, []).append(response.right)
        lengths.setdefault(response.problem, []).append(response.length)
    return {
        measure: {problem: fmean(of_problem) for problem, of_problem in values.items()}
        for measure, values in ((ACCURACY, right), (LENGTH, lengths))
    }
