import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.plan.estimate import NOTHING, Breakdown, Estimate, added, exact, latest, total
from megatron_fipo.plan.machine import Figure

NUMBERS = st.floats(0.0, 1e12)


@st.composite
def estimates(draw) -> Estimate:
    low, value, high = sorted(draw(st.tuples(NUMBERS, NUMBERS, NUMBERS)))
    return Estimate(value, low, high, frozenset({draw(st.sampled_from("ab"))}), frozenset())


@given(estimates(), estimates())
def test_bounds_and_sources_are_carried_through_sums_and_maxima(one, other):
    for combined in (one + other, latest(one, other)):
        assert combined.low <= combined.value <= combined.high
        assert combined.sources == one.sources | other.sources
    assert (one + other).high == one.high + other.high
    assert latest(one, other).low == max(one.low, other.low)


def test_order_of_the_bounds_is_required():
    with pytest.raises(ValueError, match="not within"):
        Estimate(1.0, 2.0, 3.0)


def test_a_rate_turns_its_bounds_around():
    figure = Figure(4.0, 2.0, 8.0, "a copy on one H200")
    seconds = figure.seconds(16.0, "memory")
    assert (seconds.value, seconds.low, seconds.high) == (4.0, 2.0, 8.0)
    rate = seconds.per(16.0)
    assert (rate.value, rate.low, rate.high) == (4.0, 2.0, 8.0)
    assert rate.sources == {"a copy on one H200"}


def test_a_figure_that_is_not_calibrated_is_named_instead_of_its_source():
    assumed = Figure(1.0, 1.0, 1.0, "data sheet", calibrated=False)
    result = assumed.times(3.0, "network") + exact(1.0)
    assert (result.value, result.sources, result.not_calibrated) == (4.0, frozenset(), {"network"})


def test_breakdowns_add_part_by_part():
    one, other = Breakdown({"a": exact(1.0), "b": exact(5.0)}), Breakdown({"a": exact(2.0)})
    both = added([one, other]).scaled(2.0)
    assert {name: part.value for name, part in both.parts.items()} == {"a": 6.0, "b": 10.0}
    assert (both.total, both.largest) == (exact(16.0), "b")
    assert total([]) == NOTHING
