from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.families.family import Experts
from megatron_fipo.plan.time.engine import decode_step, prefill
from tests.plan.machines import MACHINE
from tests.plan.time.cases import SHAPE, case_of

PARAMETERS = 32 * (4096 * (4096 * 2 + 1024 * 2) + 3 * 4096 * 14_336 + 2 * 4096 + 4096 + 2 * 1024)
OUTPUT = 152_064 * 4096


def engine(tp: int, **settings):
    return case_of(rollout__engine_tensor_parallel_size=tp, **settings)


def test_one_sequence_reads_the_weights():
    expected = (PARAMETERS + OUTPUT + 4096) * 2 / MACHINE.decode_weights.value
    fixed = MACHINE.decode_step.value + MACHINE.decode_sequence.value
    assert decode_step(engine(1), 1, 0).value == pytest.approx(expected + fixed)


def test_cached_tokens_are_read():
    size = 2 * 32 * 1024 * 2
    added = decode_step(engine(1), 1, 100_000).value - decode_step(engine(1), 1, 0).value
    assert added == pytest.approx(100_000 * size / MACHINE.decode_cache.value)


def test_more_ranks_than_key_value_heads_hold_heads_twice():
    added = [
        decode_step(engine(tp), 1, 10**6).value - decode_step(engine(tp), 1, 0).value for tp in (4, 8, 16)
    ]
    assert added[0] == pytest.approx(2 * added[1])
    assert added[2] == pytest.approx(added[1])


def test_many_sequences_are_bound_by_products():
    steps = [decode_step(engine(1), sequences, 0).value for sequences in (1, 2, 2_000, 2_001)]
    per_sequence = MACHINE.decode_sequence.value
    assert steps[1] - steps[0] == pytest.approx(per_sequence)
    operations = 2 * (PARAMETERS + OUTPUT) / MACHINE.products["bfloat16"].rate.value
    assert steps[3] - steps[2] == pytest.approx(per_sequence + operations, rel=0.01)


def test_small_batches_gain_less_than_ranks_from_tensor_parallelism():
    one, four = (decode_step(engine(tp), 1, 0).value for tp in (1, 4))
    assert one / 4 < four < one


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([1, 2, 4]), st.floats(1, 1_000), st.floats(0, 1e6), st.floats(1.01, 3))
def test_steps_grow_with_sequences_and_cache(tp, sequences, cached, factor):
    case = engine(tp)
    step = decode_step(case, sequences, cached)
    assert 0 < step.low <= step.value <= step.high
    assert decode_step(case, sequences * factor, cached).value > step.value
    assert decode_step(case, sequences, cached * factor + 1).value > step.value


class TestExperts:
    CASE = engine(1, architecture=replace(SHAPE, experts=Experts(128, 8, 512, normalized=True)))

    def touched(self, sequences: float) -> float:
        """Experts of a layer whose weights a step reads."""
        fixed = MACHINE.decode_step.value + sequences * MACHINE.decode_sequence.value
        size = (decode_step(self.CASE, sequences, 0).value - fixed) * MACHINE.decode_weights.value / 2
        attention, norms, router = 4096 * (4096 * 2 + 1024 * 2), 2 * 4096 + 2 * 128, 128 * 4096
        dense = 32 * (attention + norms + router) + OUTPUT + 4096
        return (size - dense) / (32 * 3 * 4096 * 512)

    def test_one_sequence_touches_its_own(self):
        assert self.touched(1) == pytest.approx(8)

    def test_many_sequences_touch_all(self):
        assert self.touched(8) == pytest.approx(128 * (1 - (15 / 16) ** 8))
        assert self.touched(100) == pytest.approx(128, rel=0.01)

    def test_a_prompt_is_multiplied_by_the_experts_of_its_tokens(self):
        """Eight experts of 512 take as long as a feed-forward part of 4,096."""
        dense = engine(1, architecture=replace(SHAPE, ffn_hidden_size=4096))
        router = 2 * 32 * 128 * 4096 * 1_000 / MACHINE.prefill.value
        assert prefill(self.CASE, 1_000).value == pytest.approx(
            prefill(dense, 1_000).value + router, rel=1e-3
        )


class TestPrefill:
    def test_takes_the_layers_operations(self):
        assert prefill(engine(1), 1_000).value == pytest.approx(
            2 * PARAMETERS * 1_000 / MACHINE.prefill.value, rel=1e-3
        )

    def test_ranks_share_it_and_communicate(self):
        one, four = (prefill(engine(tp), 10**6).value for tp in (1, 4))
        assert one / 4 < four < one
