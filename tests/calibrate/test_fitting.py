"""Fits recover the figures that points were made from, and their intervals hold the truth of noisy points."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.calibrate.fitting import (
    LEAST_HALF,
    MOST_HALF,
    Point,
    fit,
    fit_decoding,
    fit_link,
    fit_products,
    fit_rate,
    fit_seconds,
)

RATES = st.floats(min_value=1e6, max_value=1e16)
SIDES = (16, 128, 512, 2048)


def noisy(seconds: float, generator: np.random.Generator, spread: float = 0.1) -> tuple[float, ...]:
    """Repetitions that spread symmetrically around the true time."""
    return tuple(seconds * (1 + spread * generator.uniform(-1, 1, size=15)))


def product_points(rate: float, half: float, spread: float = 0.0, seed: int = 0) -> list[Point]:
    generator = np.random.default_rng(seed)
    operations = [1e9 * side for side in SIDES]
    return [
        Point((amount, float(side)), noisy(amount / rate * (1 + half / side), generator, spread))
        for amount, side in zip(operations, SIDES, strict=True)
    ]


def close(value: float) -> object:
    return pytest.approx(value, rel=1e-6)


@given(RATES, st.floats(min_value=LEAST_HALF, max_value=MOST_HALF * max(SIDES)))
def test_products_recover_rate_and_half(rate, half):
    value, found = fit_products(product_points(rate, half))
    assert value.value == pytest.approx(rate, rel=1e-3)
    assert value.low == pytest.approx(value.high, rel=1e-3)
    assert found == pytest.approx(half, rel=1e-3)


@given(RATES, st.floats(min_value=LEAST_HALF, max_value=4000), st.integers(0, 2**32 - 1))
def test_the_interval_of_noisy_products_holds_every_true_time(rate, half, seed):
    value, found = fit_products(product_points(rate, half, 0.1, seed))
    for side in SIDES:
        true = (1 + half / side) / rate
        assert (1 + found / side) / value.high <= true <= (1 + found / side) / value.low


def test_products_of_one_side_have_a_rate_and_no_half():
    points = [Point((1e9, 128.0), (0.5,)), Point((2e9, 128.0), (1.0,))]
    value, half = fit_products(points)
    assert half == LEAST_HALF
    assert value.value == close(2e9 * (1 + LEAST_HALF / 128))


def test_products_that_are_faster_with_short_sides_have_the_least_half():
    """No negative half, whatever was measured."""
    points = [Point((1e9, 128.0), (0.5,)), Point((1e9, 1024.0), (0.6,))]
    value, half = fit_products(points)
    assert half == LEAST_HALF
    assert value.low < 1e9 / 0.55 < value.high


def test_products_whose_time_depends_on_the_side_alone_have_the_most_half():
    points = [Point((1e9, float(side)), (1e9 / side,)) for side in SIDES]
    assert fit_products(points)[1] == MOST_HALF * max(SIDES)


@given(RATES, st.floats(min_value=1e-7, max_value=1e-2), st.integers(2, 8))
def test_a_link_recovers_rate_and_latency(rate, latency, ranks):
    steps = 2.0 * (ranks - 1)
    points = [
        Point((steps, size), (steps * latency + size / rate,))
        for size in (rate * latency * factor for factor in (0.1, 1.0, 100.0))
    ]
    found = fit_link(points)
    assert found[0].value == close(rate)
    assert found[1].value == close(latency)


@given(
    *(st.floats(min_value=least, max_value=most) for least, most in ((1e9, 4e12), (1e9, 4e12))),
    *(st.floats(min_value=least, max_value=most) for least, most in ((1e-3, 1e-1), (1e-6, 1e-4))),
)
def test_decoding_recovers_its_four_figures(weights, cache, step, sequence):
    weight_bytes, cache_bytes = weights * step, cache * 1e-8
    points = []
    for sequences in (8.0, 64.0, 512.0):
        for length in (100.0, 2000.0):
            each = weight_bytes / weights + step + sequences * (sequence + length * cache_bytes / cache)
            points.append(Point((32.0, 32 * sequences, 32 * sequences * length), (32 * each,)))
    found = fit_decoding(points, weight_bytes, cache_bytes, weights)
    assert found.weights.value == close(weights)
    assert found.cache.value == close(cache)
    assert found.step.value == close(step)
    assert found.sequence.value == close(sequence)


def test_decoding_faster_than_narrow_products_keeps_its_time():
    """A step of 1 s cannot read weights for 2 s: they get the rate that leaves 5 % for the rest."""
    points = [
        Point((1.0, sequences, sequences * length), (1.0 + 0.01 * sequences + 1e-5 * sequences * length,))
        for sequences in (4.0, 40.0)
        for length in (100.0, 1000.0)
    ]
    found = fit_decoding(points, 2e9, 1e3, 1e9)
    assert 2e9 / found.weights.value + found.step.value == close(1.0)
    assert found.step.value == close(0.05)


def test_coefficients_that_explain_nothing_are_positive_and_small():
    points = [Point((10.0, 10.0 * n, 10.0 * n * length), (1.0,)) for n in (1, 8) for length in (10, 100)]
    assert fit(points).coefficients == (close(0.1), 0.0, 0.0)
    found = fit_decoding(points, 1e6, 1e3, 1e12)
    assert 0 < found.sequence.value < 1e-4
    assert found.cache.value > 0


@given(st.lists(st.floats(min_value=1e-6, max_value=1e3), min_size=1, max_size=15), RATES)
def test_values_lie_in_their_intervals(seconds, amount):
    points = [Point((amount,), tuple(seconds))]
    for value in (fit_rate(points), fit_seconds(points)):
        assert 0 < value.low <= value.value <= value.high
    assert fit_rate(points).value == close(amount / float(np.median(seconds)))
    assert fit_seconds(points).value == close(float(np.median(seconds)) / amount)


def test_an_interrupted_repetition_does_not_widen_an_interval():
    value = fit_rate([Point((1.0,), (1.0,) * 14 + (50.0,))])
    assert (value.low, value.value, value.high) == (close(1.0), close(1.0), close(1.0))


def test_the_rate_of_several_points_is_their_total():
    value = fit_rate([Point((1.0,), (1.0,)), Point((9.0,), (1.0,))])
    assert (value.low, value.value, value.high) == (close(1.0), close(5.0), close(9.0))


def test_no_points_and_points_without_variety_are_refused():
    with pytest.raises(ValueError, match="nothing was measured"):
        fit([])
    with pytest.raises(ValueError, match="do not vary"):
        fit_link([Point((0.0, 1.0), (1.0,))])
