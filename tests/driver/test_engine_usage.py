"""What an engine did during an iteration, from calls and probes: alone, and in the fleet with other events."""

from dataclasses import replace
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.driver.rollout.engine_usage import (
    MAX_LISTED_ENGINES,
    EngineUsage,
    UsageMeter,
    usage_values,
)
from megatron_fipo.driver.rollout.fleet import Fleet
from megatron_fipo.engine.protocol import EngineStatus


def status(generated: int = 0, **fields: float) -> EngineStatus:
    return EngineStatus(0, tokens=generated, generated_tokens=generated, **fields)  # type: ignore[arg-type]


def test_times_counters_and_samples_of_one_iteration():
    meter = UsageMeter(0.0)
    meter.probed(status())
    meter.began(2.0)
    meter.probed(status(50))  # busy, but no request runs or waits yet: no sample
    meter.probed(
        status(100, running=4, waiting=2, kv_use=0.25, preemptions=1, prefix_queries=40, prefix_hits=10)
    )
    meter.probed(status(300, running=8, kv_use=0.75, preemptions=1, prefix_queries=50, prefix_hits=20))
    meter.ended(6.0)
    meter.probed(
        status(320, running=8, preemptions=3, prefix_queries=80, prefix_hits=20)
    )  # idle: no sample of requests
    assert meter.take(8.0) == EngineUsage(
        idle=0.5,
        running=6.0,
        waiting=1.0,
        kv_use=0.5,
        preemptions=3.0,
        prefix_hits=0.25,
        decode_tokens_per_s=80.0,
    )
    assert meter.take(9.0) == EngineUsage(1.0, None, None, None, None, None, None)


def test_a_request_that_is_at_the_engine_over_the_end_of_an_iteration_counts_in_both():
    meter = UsageMeter(0.0)
    meter.began(1.0)
    assert meter.take(4.0).idle == 0.25
    assert meter.take(10.0).idle == 0.0
    meter.ended(11.0)
    assert meter.take(14.0).idle == 0.75


def test_a_restart_begins_counters_at_zero_and_keeps_what_was_counted():
    meter = UsageMeter(0.0)
    meter.began(0.0)
    meter.probed(status(100, preemptions=5))
    meter.lost(1.0)
    meter.probed(status())
    meter.began(3.0)
    meter.probed(status(60, preemptions=2))
    meter.ended(4.0)
    usage = meter.take(4.0)
    assert (usage.idle, usage.preemptions, usage.decode_tokens_per_s) == (0.5, 7.0, 80.0)


@given(st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=4), max_size=5), st.data())
def test_no_token_is_counted_twice_or_lost(processes: list[list[int]], data: st.DataObject):
    """Each process's counter grows by the given steps, a second each; iterations end anywhere."""
    meter, now, last, counted = UsageMeter(0.0), 0.0, 0.0, 0.0
    for steps in processes:
        meter.probed(status())
        meter.began(now)
        for generated in accumulate(steps):
            now += 1.0
            meter.probed(status(generated))
            if data.draw(st.booleans()):
                counted += (meter.take(now).decode_tokens_per_s or 0.0) * (now - last)
                last = now
        meter.lost(now)
    counted += (meter.take(now).decode_tokens_per_s or 0.0) * (now - last)
    assert counted == pytest.approx(sum(map(sum, processes)))


def test_the_fleet_measures_each_engine():
    fleet = Fleet(
        2,
        max_restarts=1,
        load_timeout_s=10.0,
        health_timeout_s=8.0,
        stall_timeout_s=50.0,
        loaded_version=0,
        now=0.0,
    )
    fleet.loaded(0, status(), 0.0)
    fleet.loaded(1, status(), 0.0)
    fleet.take_usage(10.0)  # the start does not count
    fleet.called(0, 1, 10.0)
    fleet.called(0, 1, 11.0)
    fleet.answered_call(0, 1, 12.0)
    fleet.answered_probe(0, status(30, running=1), 13.0)
    fleet.failed_call(0, 15.0)
    fleet.called(1, 1, 16.0)
    fleet.lost(1, 18.0)
    first, second = fleet.take_usage(20.0)
    assert (first.idle, first.running, first.decode_tokens_per_s) == (0.5, 1.0, 6.0)
    assert second == EngineUsage(0.8, None, None, None, None, None, 0.0)


USAGE = EngineUsage(0.5, 4.0, 0.0, 0.25, None, 0.1, 100.0)


def test_one_engine_is_its_own_mean():
    assert usage_values([USAGE]) == {
        "engine_mean/idle": 0.5,
        "engine_mean/running": 4.0,
        "engine_mean/waiting": 0.0,
        "engine_mean/kv_use": 0.25,
        "engine_mean/prefix_hits": 0.1,
        "engine_mean/decode_tokens_per_s": 100.0,
    }
    assert usage_values([]) == {}


def test_engines_without_a_value_do_not_count():
    values = usage_values(
        [USAGE, replace(USAGE, running=None, idle=0.7), replace(USAGE, running=8.0, idle=0.9)]
    )
    assert values["engine_mean/idle"] == pytest.approx(0.7)
    running = {name: value for name, value in values.items() if name.endswith("/running")}
    assert running == {
        "engine_mean/running": 6.0,
        "engine_min/running": 4.0,
        "engine_max/running": 8.0,
        "engine_0/running": 4.0,
        "engine_2/running": 8.0,
    }


def test_hundreds_of_engines_are_three_numbers_each():
    few, many = usage_values([USAGE] * MAX_LISTED_ENGINES), usage_values([USAGE] * 400)
    assert "engine_15/idle" in few
    assert {name.partition("/")[0] for name in many} == {"engine_mean", "engine_min", "engine_max"}
