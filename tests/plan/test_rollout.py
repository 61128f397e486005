"""The engine of the planner: continuous batching in blocks, against cases with a known result."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.plan.rollout import (
    BLOCK,
    FOLLOWED,
    Decoding,
    StepSeconds,
    decode_engine,
    decoded_blocks,
    rollout_time,
    shuffled_lengths,
    steady,
)
from megatron_fipo.plan.workload import Assumptions, LengthLaw, Workload
from tests.plan.cases import recipe_case

ENOUGH = 1e12


def drain(lengths: np.ndarray, prompt: float, slots: int, cache: float, step: StepSeconds) -> Decoding:
    return decoded_blocks(lengths, prompt, slots, cache).timed(step)


def per_sequence(seconds: float):
    """A step whose time grows with the running responses only."""
    return lambda running, cached: 1.0 + seconds * running


def test_responses_that_fit_together_take_as_long_as_the_longest():
    done = drain(np.array([100.0, 640.0, 320.0]), 10.0, 3, ENOUGH, per_sequence(0.0))
    assert done.seconds == pytest.approx(640.0)
    assert done.full_seconds == 0.0
    assert done.mean_running <= 3


def test_one_at_a_time_takes_the_sum():
    lengths = np.array([64.0, 128.0, 192.0])
    assert drain(lengths, 0.0, 1, ENOUGH, per_sequence(0.5)).seconds == pytest.approx(1.5 * lengths.sum())


def test_a_cache_that_holds_one_prompt_runs_one_response():
    done = drain(np.full(5, 1_000.0), 100.0, 64, 150.0, per_sequence(0.0))
    assert done.seconds == pytest.approx(5_000.0)


def test_the_newest_waits_if_the_cache_is_full():
    """Two responses of four blocks and no prompt in a cache of six blocks: together for three blocks each, then the older
    alone, then the rest of the newer.
    """
    done = drain(np.full(2, 4.0 * BLOCK), 0.0, 2, 6.0 * BLOCK, per_sequence(0.0))
    assert done.seconds == pytest.approx(5.0 * BLOCK)


def test_the_tail_begins_when_the_last_response_has_started():
    lengths = np.array([BLOCK, BLOCK, 10.0 * BLOCK])
    done = drain(lengths, 0.0, 2, ENOUGH, per_sequence(0.0))
    assert (done.full_seconds, done.seconds) == (0.0 + BLOCK, 11.0 * BLOCK)


@given(
    st.lists(st.integers(1, 3_000), min_size=1, max_size=60),
    st.integers(1, 70),
    st.integers(0, 500),
    st.integers(1_000, 100_000),
)
def test_no_step_is_lost_and_the_slots_are_never_exceeded(lengths, slots, prompt, cache):
    done = drain(np.array(lengths, float), float(prompt), slots, float(cache), per_sequence(0.0))
    assert max(lengths) <= done.seconds <= sum(lengths) + BLOCK * len(lengths)
    assert done.seconds >= sum(lengths) / min(slots, len(lengths)) * 0.999
    assert 0 < done.mean_running <= slots + 1e-9
    assert done.full_seconds <= done.seconds


def test_a_long_queue_runs_as_in_the_steady_state():
    law = LengthLaw(2_000.0, 0.5, 8_000)
    work = Workload(prompt_tokens=100.0, response=law, informative=1.0, trained=4_000, sampled=4_000)
    cache, step = 150_000.0, per_sequence(0.02)
    drained = drain(shuffled_lengths(work, 4_000), 100.0, 10_000, cache, step)
    ideal = steady(work, 4_000, 10_000, cache, step)
    assert drained.full_seconds == pytest.approx(ideal.seconds, rel=0.05)


def test_responses_beyond_those_that_are_followed_run_as_in_the_steady_state():
    case = recipe_case("qwen2.5-32b")
    work = case.workload()
    followed, *_ = decode_engine(case, work, FOLLOWED, True)
    more, *_ = decode_engine(case, work, 10 * FOLLOWED, True)
    assert more.full_seconds == pytest.approx(10 * followed.full_seconds, rel=0.05)
    assert more.seconds - more.full_seconds == pytest.approx(followed.seconds - followed.full_seconds)
    assert decode_engine(case, work, 10**12, True)[0].seconds > more.seconds


def test_shuffled_lengths_have_the_laws_mean_from_few_on():
    work = Workload(1.0, LengthLaw(500.0, 0.8, 4_000), 1.0, 64, 64)
    assert shuffled_lengths(work, 64).mean() == pytest.approx(500.0, rel=0.05)
    assert shuffled_lengths(work, 64)[:16].mean() == pytest.approx(500.0, rel=0.15)


def test_responses_that_are_not_needed_only_slow_down_the_last_ones():
    """Two of three responses are needed; the third runs beside the second, until that ends."""
    lengths = np.array([2.0 * BLOCK, 4.0 * BLOCK, 40.0 * BLOCK])
    step = per_sequence(1.0)
    blocks = decoded_blocks(lengths, 0.0, 2, ENOUGH, needed=2)
    assert blocks.timed(step).seconds == pytest.approx(2 * BLOCK * 3.0 + 2 * BLOCK * 3.0)
    alone = decoded_blocks(lengths[:2], 0.0, 2, ENOUGH)
    assert alone.timed(step).seconds == pytest.approx(2 * BLOCK * 3.0 + 2 * BLOCK * 2.0)


def test_more_informative_groups_need_less_time():
    """The recipe starts 1,280 prompts, also if 512 are enough."""
    seconds = [
        rollout_time(recipe_case("qwen2.5-32b", assumptions=Assumptions(informative=share))).total.value
        for share in (0.4, 0.7, 1.0)
    ]
    assert seconds[0] > 1.3 * seconds[1] > 1.3 * 1.2 * seconds[2]
