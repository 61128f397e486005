"""Several training sets in one order: shares in every window, resumed at any prompt, and undone exactly."""

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.errors import UserError
from megatron_fipo.tasks.mixture import CIRCLE, Mixture, arc_ends
from tests.tasks.test_dataset import names, problems

WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)
LARGEST_DEFICIT = 4.0
"""Prompts by which a set may miss its share of a window. The sequence's discrepancy grows with the logarithm of the window."""


def mixture(weights=(3.0, 1.0), seed=7, size=5, order=1):
    sets = {f"s{index}": problems(size + index, f"s{index}/") for index in range(len(weights))}
    given_weights = {f"s{index}": weight for index, weight in enumerate(weights)}
    return Mixture(dict(list(sets.items())[::order]), given_weights, seed)


@settings(max_examples=40, deadline=None)
@given(weights=WEIGHTS, seed=st.integers(0, 2**40), start=st.integers(0, 10**7), length=st.integers(1, 3000))
def test_every_window_has_the_shares_of_the_weights(weights, seed, start, length):
    mixed = mixture(weights, seed)
    counts = dict.fromkeys(mixed.sets, 0)
    for number in range(start, start + length):
        counts[mixed.set_of(number)] += 1
    for name, weight in mixed.weights.items():
        assert abs(counts[name] - length * weight / sum(weights)) <= LARGEST_DEFICIT


@given(weights=WEIGHTS)
def test_the_arcs_are_in_order_and_the_sets_fill_the_circle(weights):
    ends = [0, *arc_ends(weights), CIRCLE]
    assert all(start < end for start, end in pairwise(ends))
    assert arc_ends([1.0, 1.0]) == [CIRCLE // 2]


@settings(max_examples=60, deadline=None)
@given(
    weights=WEIGHTS,
    before=st.lists(st.integers(0, 12), max_size=4),
    after=st.integers(0, 40),
    seed=st.integers(0, 9),
)
def test_resuming_continues_exactly_where_the_state_was_taken(weights, before, after, seed):
    first = mixture(weights, seed)
    for count in before:
        assert len(first.take(count)) == count
    state = json.loads(json.dumps(first.state()))
    resumed = mixture(weights, seed, order=-1)  # the order of the configuration has no effect
    resumed.load_state(state)
    assert resumed.taken == first.taken
    assert names(resumed.take(after)) == names(first.take(after))
    assert resumed.state() == first.state()


@given(weights=WEIGHTS, before=st.integers(0, 40), count=st.integers(0, 40), after=st.integers(0, 20))
def test_what_is_put_back_comes_again(weights, before, count, after):
    straight, undone = mixture(weights), mixture(weights)
    straight.take(before)
    undone.take(before)
    undone.take(count)
    undone.put_back(count)
    assert undone.taken == straight.taken
    assert names(undone.take(after)) == names(straight.take(after))


def test_a_set_has_its_own_order_whatever_the_others_are():
    def of_first(mixed, count):
        return [name for name in names(mixed.take(count)) if name.startswith("s0/")]

    alone, with_others = of_first(mixture((1.0,)), 30), of_first(mixture((1.0, 1.0, 0.3)), 100)
    shorter = min(len(alone), len(with_others))
    assert shorter >= 20
    assert alone[:shorter] == with_others[:shorter]
    assert len(set(alone[:5])) == 5, "an epoch has every problem once"
    same_size = Mixture({name: problems(6, f"{name}/") for name in "ab"}, {"a": 1.0, "b": 1.0}, 7)
    taken = names(same_size.take(12))
    by_set = [[name[2:] for name in taken if name.startswith(of)] for of in "ab"]
    assert by_set[0] != by_set[1], "sets of one size have different orders"


def test_the_order_is_pinned_so_that_old_checkpoints_resume():
    assert names(mixture((2.0, 1.0)).take(9)) == [
        "s1/3",
        "s0/2",
        "s1/5",
        "s0/0",
        "s0/3",
        "s1/4",
        "s0/4",
        "s0/1",
        "s0/3",
    ]


def test_no_more_is_put_back_than_was_taken():
    mixed = mixture()
    mixed.take(3)
    for count in (-1, 4):
        with pytest.raises(ValueError, match=r"cannot be put back"):
            mixed.put_back(count)


def test_other_sets_weights_rows_and_seeds_are_refused():
    state = mixture().state()
    for other in (mixture((3.0, 2.0)), mixture((3.0, 1.0, 1.0)), mixture((3.0,))):
        with pytest.raises(
            UserError, match=r"training sets have the weights s0 3, s1 1 but data.sets has s0 3"
        ):
            other.load_state(state)
    with pytest.raises(UserError, match=r"not the one of the checkpoint"):
        mixture(size=6).load_state(state)
    with pytest.raises(UserError, match=r"seed 7 but this run has seed 8"):
        mixture(seed=8).load_state(state)


@pytest.mark.parametrize(
    "state", [None, {}, {"sets": []}, {"epoch": 0, "position": 0, "seed": 7, "rows": "x"}]
)
def test_what_is_no_state_is_refused(state):
    with pytest.raises(ValueError, match=r"the position in data.sets is missing"):
        mixture().load_state(state)


def test_positions_that_do_not_belong_together_are_refused():
    mixed = mixture()
    mixed.take(8)
    state = mixed.state()
    state["sets"]["s0"]["position"], state["sets"]["s0"]["epoch"] = 0, 0
    with pytest.raises(ValueError, match=r"do not belong to one order"):
        mixture().load_state(state)
