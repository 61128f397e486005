"""Which runs form a variant, what a variant reached over its seeds, and how variants differ. Pure but for the tables of problems."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from megatron_fipo.study.problems import BY_PROBLEM, ProblemValues
from megatron_fipo.study.results import MEASURES, Measure, Result, differing_settings
from megatron_fipo.study.statistics import (
    Estimate,
    mean_over_seeds,
    paired_difference,
    paired_difference_by_problem,
)

OBJECTIVE = "objective.name"
Problems = Callable[[Result, int], ProblemValues]
"""The held-out problems of a run after an iteration; none if they are not known."""
COMPARED = tuple(measure for measure in MEASURES if measure.compared)
"""Measures that have means."""
PAIRED = tuple(measure for measure in COMPARED if not measure.is_difference)
"""Those that have differences of arms; arms of one task start from the same model, so gains differ as accuracies do."""


@dataclass(frozen=True)
class Variant:
    """An arm with values of the grid, in a task: what has runs over seeds."""

    task: str
    factors: tuple[tuple[str, str], ...]
    """What distinguishes it within its task, by name: the arm and the settings of the grid."""
    all_results: list[Result] = field(repr=False)
    """By seed; a seed is there once."""

    @property
    def label(self) -> str:
        """A short name: settings with the last part of their key."""
        return ", ".join(
            value if name in ("arm", OBJECTIVE) else f"{name.rpartition('.')[2]}={value}"
            for name, value in self.factors
        )

    @property
    def results(self) -> list[Result]:
        """Those that count."""
        return [result for result in self.all_results if result.counts]

    @property
    def seeds(self) -> list[int]:
        """Of the runs that count."""
        return [result.seed for result in self.results]


@dataclass(frozen=True)
class Mean:
    """What a variant reached at an iteration."""

    variant: Variant
    measure: Measure
    iteration: int
    estimate: Estimate


@dataclass(frozen=True)
class Difference:
    """A variant against another on the seeds that both have, at an iteration that both have."""

    first: Variant
    second: Variant
    measure: Measure
    iteration: int
    estimate: Estimate
    """Of first − second."""
    by_problem: bool
    """Paired by held-out problem as well, not by seed alone."""


@dataclass(frozen=True)
class Comparison:
    """All runs of a comparison and what follows from them."""

    name: str
    results: list[Result]
    variants: list[Variant]
    means: list[Mean]
    differences: list[Difference]
    settings: list[str]
    """Keys in which runs differ."""


def variants_of_study(results: Sequence[Result]) -> list[Variant]:
    """By task, arm and grid, in the order of the first run of each."""
    groups: dict[tuple, list[Result]] = {}
    for result in results:
        factors = (("arm", result.arm), *result.grid)
        groups.setdefault((result.task, factors), []).append(result)
    return [Variant(task, factors, _by_seed(found)) for (task, factors), found in groups.items()]


def variants_of_runs(results: Sequence[Result]) -> list[Variant]:
    """By all settings in which the runs differ, the objective first."""
    keys = sorted(differing_settings(results), key=lambda key: key != OBJECTIVE)
    if not keys:
        keys = [OBJECTIVE]
    groups: dict[tuple, list[Result]] = {}
    for result in results:
        groups.setdefault(tuple((key, _text(result.settings.get(key))) for key in keys), []).append(result)
    return [Variant("", factors, _by_seed(found)) for factors, found in groups.items()]


def compare(
    name: str, results: Sequence[Result], variants: Sequence[Variant], problems: Problems
) -> Comparison:
    """Means of all variants with runs that count, and differences of those pairs that differ in one factor."""
    known = [variant for variant in variants if variant.results]
    means = [mean for variant in known for measure in COMPARED if (mean := _mean(variant, measure))]
    pairs = [(a, b) for a, b in combinations(known, 2) if _comparable(a, b)]
    differences = [
        difference
        for measure in PAIRED
        for a, b in pairs
        if (difference := _difference(a, b, measure, problems))
    ]
    return Comparison(name, list(results), list(variants), means, differences, differing_settings(results))


def _by_seed(results: Sequence[Result]) -> list[Result]:
    return sorted(results, key=lambda result: result.seed)


def _comparable(a: Variant, b: Variant) -> bool:
    return a.task == b.task and sum(x != y for x, y in zip(a.factors, b.factors, strict=True)) == 1


def _mean(variant: Variant, measure: Measure) -> Mean | None:
    iteration = _last_common(variant.results, measure)
    if iteration is None:
        return None
    values = [result.series(measure)[iteration] for result in variant.results]
    return Mean(
        variant,
        measure,
        iteration,
        _limited(mean_over_seeds(values), measure, -1.0 if measure.is_difference else 0.0),
    )


def _difference(a: Variant, b: Variant, measure: Measure, problems: Problems) -> Difference | None:
    shared = sorted(set(a.seeds) & set(b.seeds))
    first, second = ([result for result in v.results if result.seed in shared] for v in (a, b))
    iteration = _last_common([*first, *second], measure)
    if iteration is None:
        return None
    estimate = _by_problem(first, second, measure, iteration, problems) if measure in BY_PROBLEM else None
    by_problem = estimate is not None
    if estimate is None:
        values = ([result.series(measure)[iteration] for result in part] for part in (first, second))
        estimate = paired_difference(*values)
    return Difference(a, b, measure, iteration, _limited(estimate, measure, -1.0), by_problem)


def _by_problem(
    first: Sequence[Result], second: Sequence[Result], measure: Measure, iteration: int, problems: Problems
) -> Estimate | None:
    tables: tuple[list[Any], list[Any]] = ([], [])
    for table, part in zip(tables, (first, second), strict=True):
        for result in part:
            found = problems(result, iteration)[measure]
            if not found:
                return None
            table.append(found)
    if any(a.keys() != b.keys() for a, b in zip(*tables, strict=True)):
        return None  # a table lacks problems, so the pairs would be those of a part
    return paired_difference_by_problem(*tables)


def _last_common(results: Sequence[Result], measure: Measure) -> int | None:
    """The last iteration at which all runs have the measure."""
    series = [set(result.series(measure)) for result in results]
    return max(set.intersection(*series), default=None) if series else None


def _limited(estimate: Estimate, measure: Measure, least: float) -> Estimate:
    return estimate.within(least, 1.0) if measure.unit == "share" else estimate


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
