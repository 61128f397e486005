"""The simulated pool: what a lost engine costs, and what the clock does."""

import math
from typing import Any

import pytest

from megatron_fipo.engine.protocol import GenerationRequest
from megatron_fipo.errors import UserError
from megatron_fipo.simulate.pool import Clock, SimulatedPool
from tests.simulate.scenarios import SAMPLING, config, responses, times

FIXED = responses(median=math.inf, limit=100)
"""All responses have 100 tokens."""


def pool(failures: Any = (), engines: int = 2, **changes: Any) -> SimulatedPool:
    made = config(num_engines=engines, max_response_length=100, max_restarts=changes.pop("max_restarts", 3))
    of = times(requests_per_call=2, **({"calls_at_once": 2} | changes))
    started = SimulatedPool(made.rollout, of, FIXED, Clock(), failures=failures)
    started.updated(range(engines), 0)
    return started


def requests(count: int) -> list[GenerationRequest]:
    return [GenerationRequest(f"0-p/{index}", (index,), seed=index) for index in range(count)]


def answers(of: SimulatedPool) -> dict[str, tuple[float, int]]:
    """When each request was answered, and with how many tokens."""
    found = {}
    while of.outstanding:
        for result in of.poll(math.inf):
            assert result.generation is not None
            assert result.request_id not in found
            found[result.request_id] = (of.clock.now, len(result.generation.response_ids))
        of.updated(of.stale(), 0)
    return found


def test_a_lost_engine_loses_only_its_own_requests():
    of = pool(failures=[(40.0, 1)], engine_restart=1000.0, calls_at_once=4)
    of.submit(requests(4), SAMPLING)
    found = answers(of)
    assert sorted(end for end, _ in found.values()) == [100.0, 100.0, 140.0, 140.0]
    assert all(tokens == 100 for _, tokens in found.values())
    usage = of.take_engine_usage()
    assert (usage.failures, usage.lost_tokens) == (1, 2 * 40)
    assert of.take_counts().retries == 2


def test_a_restarted_engine_serves_again_after_it_got_weights():
    of = pool(failures=[(40.0, 0)], engines=1, engine_restart=7.0)
    of.submit(requests(2), SAMPLING)
    assert of.poll(math.inf) == []
    assert (of.clock.now, of.starting, of.stale()) == (40.0, True, {})
    assert of.poll(math.inf) == []
    assert (of.clock.now, of.starting, of.stale()) == (47.0, False, {0: None})
    of.updated([0], 0)
    assert {end for end, _ in answers(of).values()} == {147.0}


def test_a_run_ends_when_every_engine_is_given_up():
    of = pool(failures=[(1.0, 0), (9.0, 0)], engines=1, engine_restart=1.0, max_restarts=1)
    of.submit(requests(2), SAMPLING)
    with pytest.raises(UserError, match=r"no rollout engine is left after rollout\.max_restarts = 1"):
        answers(of)


def test_the_clock_stops_at_the_horizon():
    of = pool()
    of.submit(requests(1), SAMPLING)
    of.clock.horizon = 30.5
    assert of.poll(math.inf) == []
    assert of.clock.now == 30.5
    of.clock.horizon = math.inf
    assert [result.request_id for result in of.poll(math.inf)] == ["0-p/0"]
    assert of.clock.now == 100.0


def test_an_abort_returns_every_request_with_its_tokens():
    of = pool(max_sequences=2)
    of.submit(requests(9), SAMPLING)
    of.clock.horizon = 60.0
    of.poll(math.inf)
    results = of.abort()
    assert sorted(result.request_id for result in results) == sorted(one.request_id for one in requests(9))
    tokens = [len(result.generation.response_ids) for result in results if result.generation]
    assert sorted(tokens) == [0] * 5 + [60] * 4
    assert of.outstanding == 0


def test_requests_wait_in_the_driver_while_the_cache_is_full():
    """0.9 of a cache of 300 tokens holds 4 sequences of 60 tokens on average (10 of the prompt, 0 to 100): 2 calls of 2."""
    of = pool(engines=1, cache_tokens=300)
    of.submit(requests(6), SAMPLING)
    of.clock.horizon = 1.0
    of.poll(math.inf)
    assert of.take_engine_usage().loads[-1].running == 4


def test_a_driver_that_waits_for_nothing_is_an_error():
    with pytest.raises(RuntimeError, match="no simulated engine has a request"):
        pool().poll(math.inf)


def test_an_engine_must_hold_one_response():
    with pytest.raises(UserError, match="holds 119 tokens, fewer than the longest prompt and response"):
        pool(cache_tokens=119)
