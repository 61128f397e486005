"""Group advantages, the overlong penalty and the dynamic-sampling filter, against values worked out by hand."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.objective.advantages import group_advantages, is_informative, overlong_penalty


def test_by_hand() -> None:
    """Rewards 1, -1, -1, -1: mean -0.5, unbiased std 1."""
    found = group_advantages([1.0, -1.0, -1.0, -1.0], ["a"] * 4)
    np.testing.assert_allclose(found, np.array([1.5, -0.5, -0.5, -0.5]) / (1 + 1e-6), rtol=1e-15)


def test_groups_may_interleave_and_a_group_of_one_keeps_its_reward() -> None:
    found = group_advantages([1.0, 3.0, 0.5, -1.0, 3.0], ["b", "a", "alone", "b", "a"])
    np.testing.assert_allclose(
        found, [1 / (math.sqrt(2) + 1e-6), 0, 0.5 / (1 + 1e-6), -1 / (math.sqrt(2) + 1e-6), 0], rtol=1e-15
    )


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 5), st.sampled_from("abc")), max_size=30))
def test_against_the_standard_library(rows) -> None:
    rewards, groups = [r for r, _ in rows], [g for _, g in rows]
    for found, (reward, group) in zip(group_advantages(rewards, groups), rows, strict=True):
        members = [r for r, g in rows if g == group]
        mean, std = (statistics.fmean(members), statistics.stdev(members)) if len(members) > 1 else (0.0, 1.0)
        assert found == pytest.approx((reward - mean) / (std + 1e-6), rel=1e-6, abs=1e-6)


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match=r"rewards \[2\] and 3 group ids"):
        group_advantages([1.0, 2.0], ["a", "b", "c"])


def test_overlong_penalty() -> None:
    lengths = [0, 16384, 16385, 18432, 20480]
    expected = [0.0, 0.0, -1 / 4096, -0.5, -1.0]
    np.testing.assert_allclose(overlong_penalty(lengths, 20480, 4096, 1.0), expected, rtol=1e-15)
    assert overlong_penalty(20480, 20480, 4096, 0.5) == -0.5
    assert overlong_penalty(20480, 20480, 0, 1.0) == 0.0
    with pytest.raises(ValueError, match="maximum length 10, not 20"):
        overlong_penalty(5, 10, 20, 1.0)


def test_is_informative() -> None:
    assert is_informative([1.0, 0.0, 1.0])
    assert is_informative([1.0])
    assert not is_informative([1.0, 1.0])
    assert not is_informative([0.0] * 16)
    assert not is_informative([])
