"""What is measured follows from the run."""

import numpy as np
import pytest

from megatron_fipo.calibrate.decode import decoded
from megatron_fipo.calibrate.shapes import (
    Batch,
    Weight,
    attention_operations,
    batches,
    head_weight,
    layer_weights,
    measured_weights,
    micro_batch_tokens,
    packs,
    shortened,
    sliced,
    tensor_parallel_sizes,
)
from megatron_fipo.config import load_config
from megatron_fipo.engine.protocol import Generation
from megatron_fipo.families.registry import read_model_config
from megatron_fipo.plan.case import Case
from tests.calibrate.tiny import RECIPE
from tests.plan.machines import MACHINE

MODEL = RECIPE.parent / "base-model"  # hidden 128, feed-forward 256, 4 heads of 32 in 2 groups, vocabulary 32


def countdown(*overrides: str) -> Case:
    config = load_config(RECIPE, [f"model.path={MODEL}", *overrides])
    return Case(config, *read_model_config(config.model.path), MACHINE)


def test_weights_are_those_of_one_tensor_parallel_rank():
    case = countdown("parallel.tensor_model_parallel_size=2")
    assert sorted(layer_weights(case), key=str) == sorted(
        [
            Weight(128, 128),  # (2 + 2 · 1) heads of 32
            Weight(64, 128),
            Weight(128, 256),
            Weight(128, 128),
        ],
        key=str,
    )
    assert head_weight(case) == Weight(128, 16)
    assert head_weight(case).side == 16
    assert Weight(64, 128).operations(10) == 2 * 10 * 64 * 128


def test_larger_tensor_parallel_sizes_are_measured_if_they_divide_the_model():
    assert tensor_parallel_sizes(countdown()) == [1, 2]  # two groups of keys and values
    weights = measured_weights(countdown())
    assert len(weights) == len(set(weights))
    assert set(layer_weights(countdown("parallel.tensor_model_parallel_size=2"))) < set(weights)


def test_a_rank_s_part_is_an_architecture_of_its_own():
    part = sliced(countdown().architecture, 2)
    assert (part.num_attention_heads, part.num_query_groups, part.ffn_hidden_size) == (2, 1, 128)
    assert (part.num_layers, part.hidden_size, part.kv_channels) == (2, 128, 32)


def test_a_micro_batch_has_its_budget_or_a_mini_batch():
    assert micro_batch_tokens(countdown().config) == 6 * 16 * (8 + 72)
    assert micro_batch_tokens(countdown("parallel.data_parallel_size=2").config) == 3 * 16 * 80
    assert micro_batch_tokens(countdown("batch.max_tokens_per_micro_batch=1000").config) == 1000


def test_packs_hold_typical_and_longest_sequences_that_the_model_takes():
    assert packs(countdown()) == [(80,) * 96, (176,) * 43]
    assert packs(countdown("batch.max_tokens_per_micro_batch=60")) == [(60,)]


@pytest.mark.parametrize("most", [1e2, 1e6, 1e9])
def test_shortened_packs_stay_within_the_operations(most):
    architecture = countdown().architecture
    short = shortened(architecture, (1000,) * 8, most)
    assert attention_operations(architecture, short) <= most or short[0] <= 64
    assert shortened(architecture, (10, 10), 1e12) == (10, 10)


def test_products_of_a_large_matrix_have_fewer_tokens():
    weight = Weight(5120, 27648)
    assert weight.operations(weight.tokens_within(20_480, 1e11)) <= 1e11
    assert weight.tokens_within(20_480, 1.0) == 64
    assert weight.tokens_within(10, 1.0) == 10


def test_batches_are_those_of_one_engine():
    config = countdown("rollout.num_engines=2").config
    found = batches(config, 10_000)
    assert {batch.sequences for batch in found} == {192, 48, 12}
    assert all(batch.prompt_tokens + batch.new_tokens <= 16 + 160 for batch in found)
    assert {batch.sequences for batch in batches(config, 1)} == {1}


def test_decoded_counts_the_steps_after_the_first_token():
    lengths = (3, 1)
    generations = [Generation(np.zeros(n, np.int32), np.zeros(n, np.float32), "stop", 0) for n in lengths]
    assert decoded(Batch(2, 10, 32), generations) == (2.0, 2.0, 11.0 + 12.0)
