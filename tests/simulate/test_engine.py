"""One engine against closed forms and against a loop that takes one step at a time."""

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.simulate.engine import Engine
from megatron_fipo.simulate.times import Times
from tests.simulate.scenarios import affine, sequence, times

STEP = affine(0.01, 0.001, 1e-5)


def test_sequences_of_one_length_take_the_closed_form():
    engine = Engine(times(decode_step=STEP, prefill=lambda tokens: 0.002 * tokens), 5.0)
    engine.submit([sequence(str(index), 300, prompt=7) for index in range(4)], 5.0)
    cached = 4 * (300 * 7 + 300 * 299 / 2)
    seconds = 300 * (0.01 + 4 * 0.001) + 1e-5 * cached + 0.002 * 4 * 7
    assert engine.next_event == pytest.approx(5.0 + seconds, rel=1e-12)
    assert len(engine.fire()) == 4
    assert engine.next_event == math.inf


def test_responses_to_one_prompt_share_its_prefill():
    engine = Engine(times(prefill=lambda tokens: tokens), 0.0)
    first, second = sequence("a", 5), sequence("b", 5)
    second.request = type(second.request)("b", first.request.prompt_ids, seed=1)
    engine.submit([first, second], 0.0)
    assert engine.now == 10


@dataclass
class Steps:
    """An engine that takes one step at a time, written for clarity."""

    times: Times
    now: float = 0.0
    preemptions: int = 0

    def run(self, lengths: list[int], prompt: int) -> dict[int, float]:
        """When each response ends."""
        waiting, running, ends = list(range(len(lengths))), [], {}
        held, left = dict.fromkeys(waiting, prompt), dict(enumerate(lengths))
        capacity = self.times.cache_tokens or math.inf
        while waiting or running:
            while waiting and len(running) < self.times.max_sequences:
                needed = sum(held[i] for i in running) + held[waiting[0]] + len(running) + 1
                if running and needed > capacity:
                    break
                self.now += self.times.prefill(held[waiting[0]])
                running.append(waiting.pop(0))
            self.now += self.times.decode_step(len(running), sum(held[i] for i in running))
            for i in list(running):
                held[i], left[i] = held[i] + 1, left[i] - 1
                if not left[i]:
                    ends[i] = self.now
                    running.remove(i)
            while len(running) > 1 and sum(held[i] + 1 for i in running) > capacity:
                waiting.insert(0, running.pop())
                self.preemptions += 1
        return ends


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    cache=st.one_of(st.none(), st.integers(80, 300)),
    slots=st.integers(1, 6),
)
def test_an_engine_equals_one_that_takes_single_steps(lengths, cache, slots):
    of = times(
        decode_step=STEP, prefill=lambda tokens: 0.003 * tokens, cache_tokens=cache, max_sequences=slots
    )
    stepped = Steps(of)
    expected = stepped.run(lengths, prompt=10)
    engine, ends = Engine(of, 0.0), {}
    engine.submit([sequence(str(index), length) for index, length in enumerate(lengths)], 0.0)
    while engine.next_event < math.inf:
        at = engine.next_event
        ends |= {int(ended.request.request_id): at for ended in engine.fire()}
    assert ends == pytest.approx(expected, rel=1e-9)
    assert engine.preemptions == stepped.preemptions
    assert engine.now == pytest.approx(stepped.now, rel=1e-9)


@given(at=st.floats(0.0, 80.0), cache=st.one_of(st.none(), st.integers(80, 200)))
def test_an_abort_returns_each_sequence_once_with_what_it_has(at, cache):
    engine = Engine(times(cache_tokens=cache, max_sequences=3), 0.0)
    sequences = [sequence(str(index), 25 + index) for index in range(6)]
    engine.submit(sequences, 0.0)
    ended = []
    while engine.next_event < at:
        ended += engine.fire()
    taken = engine.abort(at)
    assert {id(one) for one in [*ended, *taken]} == {id(one) for one in sequences}
    assert len(ended) + len(taken) == len(sequences)
    assert sum(one.done for one in sequences) == pytest.approx(engine.sequence_s)
    assert engine.running == engine.waiting == 0
    assert math.ceil(at) <= engine.now or not taken


def test_a_sequence_that_arrives_waits_for_the_step_in_progress():
    engine = Engine(times(), 0.0)
    engine.submit([sequence("a", 10)], 0.0)
    engine.submit([sequence("b", 2)], 3.5)
    assert engine.now == 4.0
    assert engine.next_event == 6.0
    assert [ended.request.request_id for ended in engine.fire()] == ["b"]


def test_the_newest_sequence_is_interrupted_when_the_cache_is_full():
    engine = Engine(times(cache_tokens=40), 0.0)
    old, new = sequence("old", 25), sequence("new", 25)
    engine.submit([old, new], 0.0)
    assert engine.next_event == 10.0  # 20 + 2 · 10 tokens are cached
    assert engine.fire() == []
    assert (engine.running, engine.waiting, new.done) == (1, 1, 10)
    assert engine.fire() == [old]
    assert engine.next_event == 40.0
