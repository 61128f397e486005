"""The retry bookkeeping under every mixture of failures."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.rollout.dispatch import Dispatcher, NoEngineLeftError, split_by_cost


@given(
    costs=st.lists(st.integers(1, 9), max_size=20),
    num_engines=st.integers(1, 4),
    max_retries=st.integers(0, 3),
    events=st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["ok", "ok", "fail", "lose"])), max_size=80),
)
def test_every_request_ends_once(costs, num_engines, max_retries, events):
    dispatcher = Dispatcher(costs, list(range(num_engines)), max_retries)
    script = iter(events)
    running: dict[int, list[int]] = {}
    attempts: Counter[int] = Counter()
    lost: set[int] = set()
    try:
        while not dispatcher.done:
            for engine, chunk in dispatcher.assignments():
                assert engine not in running
                assert engine not in lost
                assert chunk
                running[engine] = chunk
                attempts.update(chunk)
            pick, outcome = next(script, (0, "ok"))
            engine = sorted(running)[pick % len(running)]
            chunk = running.pop(engine)
            if outcome == "ok":
                dispatcher.succeeded(engine)
                continue
            given_up = dispatcher.failed(engine, lost=outcome == "lose")
            lost |= {engine} if outcome == "lose" else set()
            assert given_up == [request for request in chunk if attempts[request] == max_retries + 1]
    except NoEngineLeftError:
        assert len(lost) == num_engines
        assert len(dispatcher.finished) + len(dispatcher.dropped) < len(costs)
        return
    assert sorted(dispatcher.finished + dispatcher.dropped) == list(range(len(costs)))
    assert all(1 <= count <= max_retries + 1 for count in attempts.values())
    assert dispatcher.retries == sum(attempts.values()) - len(costs)
    assert all(attempts[request] == max_retries + 1 for request in dispatcher.dropped)


def test_one_poisonous_request_takes_no_other_down():
    dispatcher = Dispatcher([1] * 16, [0, 1], max_retries=2)
    while not dispatcher.done:
        for engine, chunk in dispatcher.assignments():
            if 5 in chunk:
                dispatcher.failed(engine, lost=False)
            else:
                dispatcher.succeeded(engine)
    assert dispatcher.dropped == [5]


def test_the_last_engine_lost_is_said():
    dispatcher = Dispatcher([1, 1], [0], max_retries=2)
    assert dispatcher.assignments() == [(0, [0, 1])]
    dispatcher.failed(0, lost=True)
    with pytest.raises(NoEngineLeftError):
        dispatcher.assignments()


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 6))
def test_split_keeps_order_and_balances(costs, parts):
    runs = split_by_cost(range(len(costs)), costs, parts)
    assert [request for run in runs for request in run] == list(range(len(costs)))
    assert len(runs) <= parts
    assert all(runs)
    for run in runs:
        assert sum(costs[request] for request in run) <= sum(costs) / parts + max(costs)
