"""Sizes of batches and lengths."""

from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.engine.decoding.sizes import largest_within, size_class


@given(st.integers(1, 10**6), st.sampled_from([8, 128]))
def test_a_class_is_at_most_half_larger(count, least):
    size = size_class(count, least)
    assert count <= size <= max(least, 1.5 * count)
    assert size % least == 0 or size % (least // 2) == 0
    assert size_class(size, least) == size


@given(st.integers(0, 10**7), st.sampled_from([8, 128]))
def test_the_largest_within_a_limit_is_a_class(limit, least):
    size = largest_within(limit, least)
    assert size <= limit
    if size >= least:
        assert size_class(size, least) == size
        assert size_class(size + 1, least) > limit
    else:
        assert size == limit


def test_the_sizes():
    assert [size_class(count, 8) for count in (1, 8, 9, 13, 17, 33, 384, 385)] == [
        8,
        8,
        12,
        16,
        24,
        48,
        384,
        512,
    ]
