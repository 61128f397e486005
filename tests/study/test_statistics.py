"""Intervals against known distributions, and what must not change them."""

import math
import statistics
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.study.statistics import (
    bands,
    mean_over_seeds,
    paired_difference,
    paired_difference_by_problem,
    student,
    widening,
)

VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=6)
Problems = dict[tuple, float]


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423), (500, 1.9647)],
)
def test_quantiles_of_students_distribution(degrees: int, quantile: float) -> None:
    assert student(degrees) == pytest.approx(quantile, abs=1e-4)


def test_the_widening_tends_to_one() -> None:
    factors = [widening(n) for n in range(2, 200)]
    assert factors == sorted(factors, reverse=True)
    assert 1 < factors[-1] < 1.02


def test_one_seed_has_a_mean_and_no_interval() -> None:
    for found in (
        mean_over_seeds([0.5]),
        paired_difference([0.75], [0.25]),
        paired_difference_by_problem([{("s", 1): 1.0, ("s", 2): 0.0}], [{("s", 1): 0.0, ("s", 2): 0.0}]),
    ):
        assert found is not None
        assert (found.mean, found.low, found.high, found.seeds) == (0.5, None, None, 1)


@given(VALUES)
def test_the_mean_lies_in_its_interval_whatever_the_order(values: list[float]) -> None:
    found = mean_over_seeds(values)
    assert found.mean == pytest.approx(statistics.fmean(values), abs=1e-9)
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.mean + 1e-9
    assert found.mean - 1e-9 <= found.high
    backwards = mean_over_seeds(values[::-1])
    assert (backwards.low, backwards.high) == pytest.approx((found.low, found.high), abs=1e-9)


@given(VALUES, st.floats(-50, 50), st.floats(0.01, 10))
def test_an_interval_follows_shift_and_scale(values: list[float], shift: float, scale: float) -> None:
    found, moved = mean_over_seeds(values), mean_over_seeds([shift + scale * value for value in values])
    assert found.low is not None
    assert found.high is not None
    expected = (shift + scale * found.low, shift + scale * found.high)
    assert (moved.low, moved.high) == pytest.approx(expected, abs=1e-6, rel=1e-6)


@given(VALUES)
def test_the_difference_of_a_thing_from_itself_is_zero(values: list[float]) -> None:
    found = paired_difference(values, values)
    assert (found.mean, found.low, found.high) == (0.0, 0.0, 0.0)
    problems = [{("s", number): value for number in range(3)} for value in values]
    same = paired_difference_by_problem(problems, problems)
    assert same is not None
    assert (same.mean, same.low, same.high) == (0.0, 0.0, 0.0)


@given(VALUES, VALUES)
def test_a_difference_changes_its_sign_with_the_order(a: list[float], b: list[float]) -> None:
    count = min(len(a), len(b))
    one, other = paired_difference(a[:count], b[:count]), paired_difference(b[:count], a[:count])
    assert one.mean == pytest.approx(-other.mean, abs=1e-9)


def test_two_seeds_by_hand() -> None:
    # A resample of two has the means 0, 1/2 and 1 with probability 1/4, 1/2 and 1/4: its 2.5 % quantile is 0.
    found = mean_over_seeds([0.0, 1.0])
    half = 0.5 * math.sqrt(2) * 12.7062 / 1.959964
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.5 - half, 0.5 + half), rel=1e-4)


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_an_interval_covers_the_mean_of_a_normal_as_often_as_it_claims(seeds: int) -> None:
    draws = np.random.default_rng(1).normal(size=(seeds, 2000))
    _, low, high = bands(draws)
    assert low is not None
    assert high is not None
    assert 0.92 < np.mean((low <= 0) & (high >= 0)) < 0.98


def test_many_seeds_agree_with_the_standard_error() -> None:
    values = np.random.default_rng(2).normal(size=200)
    found = mean_over_seeds(values.tolist())
    assert found.low is not None
    assert found.high is not None
    error = values.std(ddof=1) / math.sqrt(200)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.05)


def _runs(
    rng: np.random.Generator, seeds: int, problems: int, *, shared: bool, by_problem: float, by_seed: float
) -> list[Problems]:
    """Differences of each problem: an effect of the problem, the same for all seeds if `shared`, and one of the seed."""
    common = rng.normal(size=problems) * by_problem
    return [
        {
            ("s", number if shared else (seed, number)): float(value) + offset
            for number, value in enumerate(common if shared else rng.normal(size=problems) * by_problem)
        }
        for seed, offset in enumerate(rng.normal(size=seeds) * by_seed)
    ]


def _zeros(runs: Sequence[Problems]) -> list[Problems]:
    return [dict.fromkeys(run, 0.0) for run in runs]


@pytest.mark.parametrize("shared", [True, False])
def test_a_paired_interval_covers_the_difference(shared: bool) -> None:
    rng, covered, trials = np.random.default_rng(3), 0, 150
    for _ in range(trials):
        runs = _runs(rng, 5, 30, shared=shared, by_problem=1.0, by_seed=0.1)
        found = paired_difference_by_problem(runs, _zeros(runs))
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0 <= found.high
    assert covered / trials > 0.9


def test_problems_that_seeds_share_are_not_counted_once_per_seed() -> None:
    """Their difficulty is drawn once, so more seeds do not make the interval narrower; problems of each seed do."""
    widths = {}
    for shared in (True, False):
        for seeds in (4, 16):
            runs = _runs(np.random.default_rng(4), seeds, 50, shared=shared, by_problem=1.0, by_seed=0.0)
            found = paired_difference_by_problem(runs, _zeros(runs))
            assert found is not None
            assert found.low is not None
            assert found.high is not None
            widths[shared, seeds] = (found.high - found.low) / widening(seeds)
    assert widths[True, 16] / widths[True, 4] == pytest.approx(1.0, abs=0.1)
    assert widths[False, 16] / widths[False, 4] < 0.75


def test_pairing_removes_what_problems_have_in_common() -> None:
    """Two arms with the same difficulty per problem and a constant gain: paired, the gain is certain."""
    rng = np.random.default_rng(5)
    second = [{("s", (seed, i)): float(rng.normal()) for i in range(40)} for seed in range(3)]
    first = [{problem: value + 0.1 for problem, value in run.items()} for run in second]
    found = paired_difference_by_problem(first, second)
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))


def test_sets_have_the_same_weight_and_only_common_problems_count() -> None:
    first = [{("a", 1): 1.0, ("a", 2): 1.0, ("a", 3): 0.0, ("b", 1): 0.0}]
    second = [{("a", 1): 0.0, ("a", 2): 0.0, ("b", 1): 0.0, ("b", 2): 1.0}]
    found = paired_difference_by_problem(first, second)
    assert found is not None
    assert found.mean == 0.5


def test_seeds_with_other_sets_cannot_be_paired_by_problem() -> None:
    runs: list[Problems] = [{("a", 1): 1.0}, {("b", 1): 1.0}]
    assert paired_difference_by_problem(runs, runs) is None
    assert paired_difference_by_problem([{("a", 1): 1.0}], [{("a", 2): 1.0}]) is None
