"""The scan against its definition, for any cut of any sequence."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.objective.future_kl import scan_future_kl
from megatron_fipo.objective.scan_layout import ChunkTable, build_scan_plan
from tests.objective.oracle import future_kl_by_definition
from tests.objective.packed import contiguous, random_case, scan_ranks, scattered, zigzag

HALF_LIVES = st.sampled_from([1e-300, 1e-3, 0.5, 8.0, 32.0, 4096.0, math.inf])
LENGTHS = st.lists(st.integers(0, 400), min_size=1, max_size=5)


def one_rank(lengths: list[int]) -> ChunkTable:
    return ChunkTable(np.zeros((1, len(lengths), 1), dtype=np.int64), np.array(lengths).reshape(1, -1, 1))


def test_the_worked_example() -> None:
    """The numbers in the docstring of `future_kl.py`: 2 sequences of 8 and 4 ones, half life 1, cp = 2, zigzag."""
    table = zigzag([8, 4], 2)
    assert table.first.tolist() == [[[0, 6], [0, 3]], [[2, 4], [1, 2]]]  # [rank][sequence][chunk]
    assert table.length.tolist() == [[[2, 2], [1, 1]], [[2, 2], [1, 1]]]

    plan = build_scan_plan(table, 1, [0, 0, 0, 0, 1, 1], [2, 3, 4, 5, 1, 2])
    assert plan.row_distance.tolist() == [2, 1, 2, 1, 1, 1]  # to the end of the chunk
    # From the end of rank 1's chunk 2 3, which is 4, to the chunks [rank][chunk] of sequence 0.
    assert plan.chunk_distance[:, 0, :, 0].tolist() == [[0, 2], [0, 0]]
    assert plan.is_later[:, 0, :, 0].tolist() == [[0, 1], [0, 1]]

    ones, rows = [np.ones(8), np.ones(4)], [np.ones(8, bool), np.ones(4, bool)]
    long, short = scan_ranks(table, ones, rows, 1.0)
    assert long[3] == 1 + 1.875 / 2 == 1.9375
    assert long.tolist() == [2 - 2.0 ** -(7 - t) for t in range(8)]
    assert short[0] == 1 + 1.75 / 2 == 1.875
    assert short.tolist() == [1.875, 1.75, 1.5, 1.0]


@settings(max_examples=60, deadline=None)
@given(LENGTHS, HALF_LIVES, st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**30))
def test_any_cut_gives_the_definition(lengths, half_life, cp, chunks, seed) -> None:
    """Cutting a sequence anywhere, over any ranks, in any order, does not change F."""
    values, masks = random_case(seed, lengths)
    found = scan_ranks(scattered(lengths, cp, chunks, seed), values, masks, half_life)
    for value, mask, f in zip(values, masks, found, strict=True):
        expected = future_kl_by_definition(torch.from_numpy(value), half_life).numpy()
        np.testing.assert_allclose(f[mask], expected[mask], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("layout", [zigzag, contiguous])
@pytest.mark.parametrize("cp", [1, 2, 8])
def test_megatron_layouts(layout, cp) -> None:
    lengths = [1, 2, 15, 16, 17, 900]
    values, masks = random_case(3, lengths)
    for value, mask, f in zip(
        values, masks, scan_ranks(layout(lengths, cp), values, masks, 32.0), strict=True
    ):
        expected = future_kl_by_definition(torch.from_numpy(value), 32.0).numpy()
        np.testing.assert_allclose(f[mask], expected[mask], rtol=1e-11, atol=1e-11)


@settings(max_examples=30, deadline=None)
@given(LENGTHS, st.integers(0, 2**30), st.randoms(use_true_random=False))
def test_permuting_the_pack_permutes_the_result(lengths, seed, random) -> None:
    values, masks = random_case(seed, lengths)
    order = random.sample(range(len(lengths)), len(lengths))
    before = scan_ranks(one_rank(lengths), values, masks, 32.0)
    shuffled = scan_ranks(
        one_rank([lengths[i] for i in order]), [values[i] for i in order], [masks[i] for i in order], 32.0
    )
    for position, i in enumerate(order):
        np.testing.assert_allclose(shuffled[position], before[i], rtol=0, atol=1e-13)


@given(st.integers(0, 2**30))
@settings(max_examples=20, deadline=None)
def test_the_order_of_rows_does_not_matter(seed) -> None:
    random = np.random.default_rng(seed)
    order = random.permutation(300)
    x = torch.from_numpy(random.standard_normal(300))
    none = torch.empty(300, 0)
    rising = build_scan_plan(one_rank([300]), 0, np.zeros(300, int), np.arange(300))
    shuffled = build_scan_plan(one_rank([300]), 0, np.zeros(300, int), order)
    torch.testing.assert_close(
        scan_future_kl(x[order], none, shuffled, 32.0)[0], scan_future_kl(x, none, rising, 32.0)[0][order]
    )


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50), HALF_LIVES, st.integers(0, 2**30))
@settings(max_examples=50, deadline=None)
def test_the_pair_of_length_and_aggregate_is_associative(a, b, c, half_life, seed) -> None:
    """(n₁,A₁)∘(n₂,A₂) = (n₁+n₂, A₁+γ^n₁·A₂) composes the same either way, and to the aggregate of the complete run."""
    gamma = 2.0 ** (-1 / half_life)
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal(a + b + c))

    def pair(values):
        return len(values), future_kl_by_definition(values, half_life)[0].item() if len(values) else 0.0

    def compose(left, right):
        return left[0] + right[0], left[1] + gamma ** left[0] * right[1]

    parts = [pair(part) for part in x.split([a, b, c])]
    left = compose(compose(parts[0], parts[1]), parts[2])
    right = compose(parts[0], compose(parts[1], parts[2]))
    assert left == (a + b + c, pytest.approx(right[1], abs=1e-12))
    assert left[1] == pytest.approx(pair(x)[1], abs=1e-12)


def test_no_decay_is_a_suffix_sum_and_instant_decay_is_x_itself() -> None:
    values, masks = random_case(0, [700], share=1.0)
    np.testing.assert_allclose(
        scan_ranks(one_rank([700]), values, masks, math.inf)[0], values[0][::-1].cumsum()[::-1], atol=1e-12
    )
    np.testing.assert_array_equal(scan_ranks(one_rank([700]), values, masks, 1e-320)[0], values[0])


@pytest.mark.parametrize("half_life", [32.0, 4096.0])
def test_long_float32_sequences_lose_nothing(half_life) -> None:
    """81,920 float32 tokens: F is the float64 result to float32 rounding, and three levels of blocks are at work."""
    length = 81_920
    x = torch.randn(length, generator=torch.Generator().manual_seed(0))
    plan = build_scan_plan(one_rank([length]), 0, np.zeros(length, int), np.arange(length))
    assert [level.blocks for level in plan.levels] == [640, 5, 1]
    found = scan_future_kl(x, x.new_empty(length, 0), plan, half_life)[0]
    gamma, carry, serial = 2.0 ** (-1 / half_life), 0.0, np.empty(length)
    for t in range(length - 1, -1, -1):
        serial[t] = carry = x[t].item() + gamma * carry
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), serial, rtol=1.2e-7, atol=1e-10)


def test_a_rank_without_rows_takes_part() -> None:
    table = zigzag([64, 3], 2)
    plan = build_scan_plan(table, 1, np.empty(0), np.empty(0))
    assert plan.num_rows == 0
    assert plan.num_sequences == 2
    lonely = build_scan_plan(one_rank([64, 3]), 0, np.empty(0), np.empty(0))
    future_kl, totals = scan_future_kl(torch.empty(0), torch.empty(0, 2), lonely, 32.0)
    assert future_kl.shape == (0,)
    assert totals.tolist() == [[0, 0], [0, 0]]


BAD_TABLES = {
    "positions 4 to 5 of sequence 1 are held by no rank": (
        [[[0], [0]], [[8], [6]]],
        [[[8], [4]], [[8], [4]]],
    ),
    "positions 6 to 7 of sequence 0 are held twice": ([[[0], [0]], [[6], [8]]], [[[8], [8]], [[8], [8]]]),
    "positions 0 to 1 of sequence 0 are held by no rank": ([[[2]]], [[[5]]]),
    "length of chunk 0 of sequence 0 on rank 1 is -3": ([[[0]], [[5]]], [[[5]], [[-3]]]),
    "first position of chunk 0 of sequence 0 on rank 0 is -1": ([[[-1]]], [[[5]]]),
}


@pytest.mark.parametrize("message", BAD_TABLES)
def test_bad_chunk_tables_are_named(message) -> None:
    first, length = (np.array(values) for values in BAD_TABLES[message])
    with pytest.raises(ValueError, match=message):
        build_scan_plan(ChunkTable(first, length), 0, np.empty(0), np.empty(0))


def test_bad_rows_are_named() -> None:
    table = zigzag([8, 8], 2)  # rank 0 holds 0, 1 and 6, 7
    with pytest.raises(ValueError, match=r"rank 0 does not hold position 3 of sequence 1 \(row 1\)"):
        build_scan_plan(table, 0, np.array([0, 1]), np.array([0, 3]))
    with pytest.raises(ValueError, match="position 6 of sequence 1 has more than one row"):
        build_scan_plan(table, 0, np.array([0, 1, 1]), np.array([0, 6, 6]))
    with pytest.raises(ValueError, match="row 1 is of sequence 2, but the chunk table has 2"):
        build_scan_plan(table, 0, np.array([0, 2]), np.array([0, 0]))
    with pytest.raises(ValueError, match="rank 2 is outside"):
        build_scan_plan(table, 2, np.empty(0), np.empty(0))
    with pytest.raises(ValueError, match="integers"):
        ChunkTable(np.zeros((1, 1, 1)), np.ones((1, 1, 1)))
    with pytest.raises(ValueError, match=r"\[1, 1, 1\] but length is \[1, 2, 1\]"):
        ChunkTable(np.zeros((1, 1, 1), int), np.ones((1, 2, 1), int))


def test_index_arrays_may_be_read_only_or_strided_and_are_copied() -> None:
    first, length = np.zeros((1, 1, 1), dtype=np.int64), np.full((1, 1, 1), 4)
    length.flags.writeable = False
    table = ChunkTable(first[::-1], length)
    first[:] = 9
    assert table.first.tolist() == [[[0]]]
    pairs = np.array([[0, 3], [0, 2], [0, 1]])
    plan = build_scan_plan(table, 0, pairs[:, 0], pairs[:, 1])
    assert plan.row_sequence.is_contiguous()
    assert plan.row_distance.tolist() == [1, 2, 3]
    for wrong in (np.full((1, 1, 1), 1j), np.full((1, 1, 1), 0.5), np.array([[["a"]]]), [[[None]]]):
        with pytest.raises(ValueError, match="chunk table: first must be integers"):
            ChunkTable(wrong, length)


def test_misuse_of_the_scan_is_refused_before_any_collective() -> None:
    plan = build_scan_plan(one_rank([4]), 0, np.zeros(4, int), np.arange(4))
    x, extra_sums = torch.zeros(4), torch.zeros(4, 1)
    for bad_half_life in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"half_life must be positive, not {bad_half_life}"):
            scan_future_kl(x, extra_sums, plan, bad_half_life)
    with pytest.raises(ValueError, match=r"x \[3\]"):
        scan_future_kl(x[:3], extra_sums, plan, 32.0)
    with pytest.raises(ValueError, match="bfloat16"):
        scan_future_kl(x.bfloat16(), extra_sums, plan, 32.0)
    two = build_scan_plan(zigzag([4], 2), 0, np.zeros(2, int), np.array([0, 3]))
    with pytest.raises(ValueError, match="plan is for 2 context-parallel ranks, but the group has 1"):
        scan_future_kl(x[:2], extra_sums[:2], two, 32.0)
