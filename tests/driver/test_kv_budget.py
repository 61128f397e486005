"""How many sequences an engine runs at once follows the lengths that were seen."""

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.driver.rollout.kv_budget import ASSUMED, REMEMBERED, USED_SHARE, KVBudget
from megatron_fipo.engine.protocol import EngineStatus


def test_the_worked_example():
    budget = KVBudget(longest=1000)
    for _ in range(5 * REMEMBERED):
        budget.finished(0, 100)
        budget.finished(0, 900)
    assert budget.tokens_per_sequence == pytest.approx(410, rel=0.01)
    assert budget.sequences(41_000) == pytest.approx(USED_SHARE * 100, rel=0.01)


def test_without_a_finished_sequence_the_limit_decides():
    budget = KVBudget(longest=22_528)
    assert budget.sequences(700_000) == pytest.approx(USED_SHARE * 700_000 / 11_264)
    assert budget.sequences(10) == 1
    assert budget.sequences(None) == math.inf


@given(lengths=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=30))
def test_it_is_the_average_over_the_steps_of_all_sequences(lengths):
    """Against a sum over every step of every sequence, the assumed ones included."""
    budget = KVBudget(longest=100)
    for prompt, response in lengths:
        budget.finished(prompt, response)
    everything = [*lengths, *[(0, 100)] * ASSUMED]
    held = [prompt + step + 0.5 for prompt, response in everything for step in range(response)]
    assert budget.tokens_per_sequence == pytest.approx(sum(held) / len(held))


def test_an_engine_gets_what_fits_beside_its_requests_and_nothing_while_some_wait():
    budget = KVBudget(longest=1000)
    status = EngineStatus(0, tokens=0, kv_tokens=50_000)
    assert budget.space(status, requests=30) == budget.sequences(50_000) - 30 > 0
    assert budget.space(replace(status, waiting=1), requests=30) == 0
    assert budget.space(replace(status, kv_tokens=None), requests=30) == math.inf


def test_a_first_short_response_does_not_open_the_gate():
    budget = KVBudget(longest=20_000)
    before = budget.sequences(700_000)
    budget.finished(10, 1)
    assert budget.sequences(700_000) == pytest.approx(before, rel=0.001)


def test_it_follows_responses_that_grow():
    budget = KVBudget(longest=20_000)
    for _ in range(5 * REMEMBERED):
        budget.finished(0, 1000)
    for _ in range(5 * REMEMBERED):
        budget.finished(0, 4000)
    assert budget.tokens_per_sequence == pytest.approx(2000, rel=0.02)


def test_a_full_engine_stays_near_its_cache():
    """A simulation: sequences of random lengths, refilled up to the budget, hold about the share that is meant."""
    rng, cache = random.Random(1), 200_000
    budget, running, use = KVBudget(longest=8000), [], []
    for step in range(20_000):
        while len(running) < budget.sequences(cache):
            running.append([min(8000, int(rng.expovariate(1 / 1500)) + 1), 0])
        for sequence in running:
            sequence[1] += 1
        for length, done in running:
            if done == length:
                budget.finished(0, length)
        running = [sequence for sequence in running if sequence[1] < sequence[0]]
        if step > 10_000:
            use.append(sum(done for _, done in running) / cache)
    assert USED_SHARE - 0.1 < sum(use) / len(use) < USED_SHARE + 0.1
