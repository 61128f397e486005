"""Calls and retries. Properties under any order of events are tested in `test_fleet.py`."""

import math
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.driver.rollout.dispatch import Call, Dispatcher
from megatron_fipo.engine.protocol import GenerationRequest, SamplingParams

PLAIN = SamplingParams(1.0, 1.0, 8)


def requests(count: int, first: int = 0) -> list[GenerationRequest]:
    return [GenerationRequest(str(first + index), (1, 2), seed=index) for index in range(count)]


def dispatcher(requests_per_call=8, calls_at_once=1, max_retries=2, keep_batches=False) -> Dispatcher:
    return Dispatcher(
        requests_per_call=requests_per_call,
        calls_at_once=calls_at_once,
        max_retries=max_retries,
        keep_batches=keep_batches,
    )


def anywhere(engines: Iterable[int]) -> dict[int, float]:
    """Engines with space for any number of requests."""
    return dict.fromkeys(engines, math.inf)


def ids(call: Call) -> list[str]:
    return [request.request_id for request in call.requests]


def finish(work: Dispatcher, engines: list[int], poison: str) -> tuple[list[str], int]:
    """Run to the end; calls with request `poison` fail. Returns the ids given up and the number of calls."""
    given_up, calls = [], 0
    while work.outstanding:
        for call in work.start_calls(anywhere(engines)):
            calls += 1
            if poison in ids(call):
                given_up += work.failed(call)
            else:
                work.answered(call)
    return given_up, calls


@pytest.mark.parametrize("count", [1, 16, 100])
def test_one_poisonous_request_takes_no_other_down(count):
    work = dispatcher()
    work.submit(requests(count), PLAIN)
    assert finish(work, [0, 1], "0")[0] == ["0"]


def test_a_kept_batch_is_given_up_whole():
    work = dispatcher(keep_batches=True, max_retries=1)
    work.submit(requests(10), PLAIN)
    work.submit(requests(5, first=10), PLAIN)
    assert finish(work, [0, 1], "3") == ([str(index) for index in range(10)], 3)


@given(
    count=st.integers(0, 200),
    requests_per_call=st.integers(1, 16),
    calls_at_once=st.integers(1, 5),
    engines=st.integers(1, 5),
)
def test_calls_keep_order_and_are_even(count, requests_per_call, calls_at_once, engines):
    work = dispatcher(requests_per_call, calls_at_once)
    work.submit(requests(count), PLAIN)
    calls = work.start_calls(anywhere(range(engines)))
    sent = [request_id for call in calls for request_id in ids(call)]
    assert sent == [str(index) for index in range(len(sent))]
    slots = engines * calls_at_once
    assert len(calls) <= slots
    assert len(calls) >= min(count, slots) / 2
    sizes = [len(call.items) for call in calls]
    assert all(size <= requests_per_call for size in sizes)
    assert len(set(sizes[:-1])) <= 1
    per_engine = [len(work.at(engine)) for engine in range(engines)]
    assert max(per_engine) - min(per_engine) <= 1
    rounds = -(-count // (slots * requests_per_call)) if count else 0
    assert all(size <= -(-count // (slots * rounds)) for size in sizes)


def test_a_busy_engine_gets_no_more_than_its_calls():
    work = dispatcher(requests_per_call=1, calls_at_once=2)
    work.submit(requests(5), PLAIN)
    first, second = work.start_calls(anywhere([0]))
    assert work.start_calls(anywhere([0])) == []
    assert work.busy == [0]
    work.answered(first)
    assert [ids(call) for call in work.start_calls(anywhere([0]))] == [["2"]]
    assert work.at(0)[0] is second
    assert [call.engine for call in work.start_calls(anywhere([0, 1]))] == [1, 1]


def test_calls_do_not_mix_sampling_parameters():
    work = dispatcher()
    work.submit(requests(3), PLAIN)
    work.submit(requests(3, first=3), SamplingParams(0.0, 1.0, 8))
    calls = work.start_calls(anywhere([0])) + work.start_calls(anywhere([1]))
    assert [(ids(call), call.sampling.temperature) for call in calls] == [
        (["0", "1", "2"], 1.0),
        (["3", "4", "5"], 0.0),
    ]


def test_withdrawn_requests_are_forgotten_and_running_ones_are_not():
    work = dispatcher(requests_per_call=2)
    work.submit(requests(5), PLAIN)
    (call,) = work.start_calls(anywhere([0]))
    assert work.withdraw() == ["2", "3", "4"]
    assert work.outstanding == 2
    work.failed(call)
    assert work.withdraw() == ["0", "1"]
    assert work.outstanding == 0
    work.submit(requests(5), PLAIN)
    assert work.outstanding == 5


def test_an_id_may_be_used_again_only_after_its_request_has_ended():
    work = dispatcher()
    work.submit(requests(2), PLAIN)
    with pytest.raises(ValueError, match="id 1 is already outstanding"):
        work.submit(requests(1, first=1), PLAIN)


def test_requests_wait_here_while_engines_have_no_space():
    work = dispatcher(requests_per_call=4, calls_at_once=3)
    work.submit(requests(60), PLAIN)
    first = work.start_calls({0: 8, 1: 0, 2: math.inf})
    assert [call.engine for call in first].count(0) == 2
    assert [call.engine for call in first].count(1) == 1  # an engine without a call gets one in any case
    assert [call.engine for call in first].count(2) == 3
    assert work.requests_at(0) == 8
    assert work.start_calls({0: 0, 1: 0.5, 2: math.inf}) == []
    work.answered(first[0])
    assert work.requests_at(first[0].engine) == sum(len(call.items) for call in work.at(first[0].engine))


@given(
    count=st.integers(0, 100),
    space=st.lists(st.floats(-5, 40) | st.just(math.inf), min_size=1, max_size=4),
    calls_at_once=st.integers(1, 5),
    rounds=st.integers(1, 4),
)
def test_no_engine_gets_more_than_a_call_above_its_space(count, space, calls_at_once, rounds):
    work = dispatcher(requests_per_call=4, calls_at_once=calls_at_once)
    work.submit(requests(count), PLAIN)
    for _ in range(rounds):
        left = {engine: free - work.requests_at(engine) for engine, free in enumerate(space)}
        work.start_calls(left)
    for engine, free in enumerate(space):
        assert work.requests_at(engine) < max(free, 0) + 4 + 1
        assert len(work.at(engine)) <= calls_at_once
    if count:
        assert work.busy
