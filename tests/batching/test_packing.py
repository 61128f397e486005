"""Packing: every sequence once, within the budget, the same count on every rank, balanced, deterministic."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.batching.packing import (
    micro_batch_multiple,
    padded_lengths,
    plan_micro_batches,
    sequence_cost,
)

LENGTHS = st.lists(st.integers(1, 96), max_size=60)


def tokens(lengths, members, multiple):
    return int(padded_lengths([lengths[i] for i in members], multiple).sum())


def cost(lengths, members, multiple=1):
    return float(sequence_cost(padded_lengths([lengths[i] for i in members], multiple)).sum())


@settings(max_examples=200, deadline=None)
@given(
    lengths=LENGTHS,
    ranks=st.integers(1, 5),
    multiple=st.sampled_from([1, 2, 4, 8]),
    budget=st.integers(96, 300),
)
def test_every_plan_keeps_its_promises(lengths, ranks, multiple, budget):
    plan = plan_micro_batches(
        lengths, data_parallel_size=ranks, token_budget=budget, length_multiple=multiple
    )

    assert sorted(i for rank in plan for members in rank for i in members) == list(range(len(lengths)))
    assert all(tokens(lengths, members, multiple) <= budget for rank in plan for members in rank)
    assert len(plan) == ranks
    assert len({len(rank) for rank in plan}) == 1
    micro_batches = ranks * len(plan[0])
    assert sum(not members for rank in plan for members in rank) == max(0, micro_batches - len(lengths))
    assert plan == plan_micro_batches(
        lengths, data_parallel_size=ranks, token_budget=budget, length_multiple=multiple
    )


def test_a_micro_batch_still_fits_once_it_is_padded():
    lengths = [40, 40, 40, 40]
    # A budget of 90 tokens has space for one complete block of 80 tokens, or one of 48.
    for pack_multiple, per_micro_batch in ((1, 2), (80, 2), (48, 1)):
        plan = plan_micro_batches(
            lengths, data_parallel_size=1, token_budget=90, length_multiple=8, pack_multiple=pack_multiple
        )
        assert {len(members) for members in plan[0]} == {per_micro_batch}


def fewest_bins(sizes, budget):
    """Exact bin packing of a few sizes: tries every bin for each."""
    best = len(sizes)

    def place(index, bins):
        nonlocal best
        if len(bins) >= best:
            return
        if index == len(sizes):
            best = len(bins)
            return
        for i in range(len(bins)):
            if bins[i] + sizes[index] <= budget:
                place(index + 1, [*bins[:i], bins[i] + sizes[index], *bins[i + 1 :]])
        place(index + 1, [*bins, sizes[index]])

    place(0, [])
    return best


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(10, 96), min_size=1, max_size=7), ranks=st.integers(1, 3))
def test_a_handful_of_sequences_takes_no_more_micro_batches_than_it_must(lengths, ranks):
    plan = plan_micro_batches(lengths, data_parallel_size=ranks, token_budget=100, length_multiple=1)
    assert len(plan[0]) == -(-fewest_bins(sorted(lengths, reverse=True), 100) // ranks)


def test_sizes_that_only_best_fit_can_pack_get_no_extra_micro_batch():
    """Cheapest-first would pair 50 and 40 twice, with no space for 20. Only 50 + 50 and 40 + 40 + 20 fit."""
    plan = plan_micro_batches([20, 40, 40, 50, 50], data_parallel_size=1, token_budget=100, length_multiple=1)
    assert sorted(plan[0]) == [[0, 1, 2], [3, 4]]


def test_work_is_even_over_ranks_by_cost_not_by_tokens():
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(8.5, 0.7, 512).astype(int) + 100, 22528).tolist()
    plan = plan_micro_batches(lengths, data_parallel_size=8, token_budget=22528, length_multiple=8)
    totals = [sum(cost(lengths, members, 8) for members in rank) for rank in plan]
    assert max(totals) < 1.03 * min(totals)

    # A long sequence costs more than two of half its length. Balancing tokens would put 500 on each rank.
    lengths = [400, 200, 200, 100, 100]
    plan = plan_micro_batches(
        lengths, data_parallel_size=2, token_budget=800, length_multiple=1, attention_crossover=10.0
    )
    assert [[0]] in plan


def test_the_costliest_micro_batch_comes_first():
    plan = plan_micro_batches(
        [10, 20, 90, 80, 30, 70], data_parallel_size=1, token_budget=100, length_multiple=1
    )
    costs = [cost([10, 20, 90, 80, 30, 70], members) for members in plan[0]]
    assert costs == sorted(costs, reverse=True)


def test_fewer_sequences_than_ranks_leave_empty_micro_batches():
    plan = plan_micro_batches([5, 6], data_parallel_size=3, token_budget=10, length_multiple=2)
    assert sorted(plan) == [[[]], [[0]], [[1]]]
    assert plan_micro_batches([], data_parallel_size=2, token_budget=10, length_multiple=2) == [[[]], [[]]]


def test_a_sequence_above_the_budget_is_named_with_the_mend():
    with pytest.raises(
        ValueError, match=r"sequence 1 has 97 tokens, 100 after padding.*max_tokens_per_micro_batch"
    ):
        plan_micro_batches([3, 97], data_parallel_size=1, token_budget=99, length_multiple=4)
    with pytest.raises(ValueError, match="must be positive"):
        plan_micro_batches([3], data_parallel_size=0, token_budget=99, length_multiple=4)


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_interleaved_pipelines_get_whole_groups_of_micro_batches(stages):
    """Megatron's interleaved schedule refuses, for example, 5 micro-batches on 4 stages, and 1 on 2."""
    multiple = micro_batch_multiple(stages, 2)
    assert multiple == stages
    assert micro_batch_multiple(stages, None) == 1
    for count in range(1, 12):
        (rank,) = plan_micro_batches(
            [90] * count, data_parallel_size=1, token_budget=100, length_multiple=1, count_multiple=multiple
        )
        assert len(rank) == -(-count // stages) * stages
        assert sorted(i for members in rank for i in members) == list(range(count))
