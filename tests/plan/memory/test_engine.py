"""Memory of an engine's GPUs: weights, the tokens of its KV cache, and what a colocated trainer leaves."""

from dataclasses import replace

import pytest

from megatron_fipo.driver.rollout.kv_budget import USED_SHARE as DRIVERS_SHARE
from megatron_fipo.engine.vllm_engine import VLLMEngine
from megatron_fipo.engine.vllm_start import ModelFacts
from megatron_fipo.plan.memory.engine import MAX_SEQUENCES, USED_SHARE, engine_memory
from megatron_fipo.plan.memory.trainer import trainer_memory
from tests.plan.cases import recipe_case
from tests.plan.machines import toy_machine

GIB = 2**30
COLOCATED = (
    "rollout.placement=colocated",
    "rollout.engine_tensor_parallel_size=1",
    "rollout.num_engines=8",
)


def test_limits_are_those_of_the_driver_and_of_the_engine():
    assert VLLMEngine.requests_per_call * VLLMEngine.calls_at_once == MAX_SEQUENCES
    assert USED_SHARE == DRIVERS_SHARE


def test_the_cache_of_a_token_is_that_of_the_engine():
    for name, ranks in (("qwen2.5-32b", 4), ("qwen2.5-7b-math", 1), ("qwen2.5-7b-math", 28)):
        case = recipe_case(name, f"rollout.engine_tensor_parallel_size={ranks}")
        sizes = case.architecture
        facts = ModelFacts(
            weights={},
            weight_bytes=0,
            end_ids=frozenset(),
            layers=sizes.num_layers,
            attention_heads=sizes.num_attention_heads,
            key_value_heads=sizes.num_query_groups,
            head_size=sizes.kv_channels,
            element_bytes=2,
        )
        assert engine_memory(case).cache_bytes_per_token == facts.kv_bytes(1, ranks)


def test_the_32b_recipes_engine():
    """2 (key, value) x 64 layers x 2 of 8 groups x 128 x 2 bytes per token on each of 4 GPUs."""
    case = recipe_case("qwen2.5-32b")
    found = engine_memory(case)
    assert found.cache_bytes_per_token == 65_536
    assert found.weights == pytest.approx(2 * case.family.parameters(case.architecture) / 4, rel=1e-3)
    assert found.cache_tokens.value == pytest.approx(
        (0.85 * 80 * GIB - found.weights - found.other.value) / 65_536
    )
    assert found.cache_tokens.low < found.cache_tokens.value < found.cache_tokens.high
    assert found.trainer.value == 0


def test_more_ranks_than_groups_replicate_keys_and_values():
    """4 groups: on 4 ranks each has one, on 28 too. Their projections are whole there."""
    four, many = (
        engine_memory(recipe_case("qwen2.5-7b-math", f"rollout.engine_tensor_parallel_size={ranks}"))
        for ranks in (4, 28)
    )
    assert many.cache_bytes_per_token == four.cache_bytes_per_token == 2 * 28 * 128 * 2
    key_and_value = 28 * 2 * 128 * 3584 * 2
    assert many.weights - four.weights / 7 > 0.8 * key_and_value


def test_fp8_halves_the_cache_or_the_weights():
    case = recipe_case("qwen2.5-32b")
    plain, cache = engine_memory(case), engine_memory(case, cache_bytes_per_element=1)
    assert cache.cache_bytes_per_token == plain.cache_bytes_per_token / 2
    assert cache.cache_tokens.value == pytest.approx(2 * plain.cache_tokens.value)
    assert engine_memory(case, weight_bytes_per_element=1).weights == plain.weights / 2


def test_sequences_are_limited_by_the_cache_and_by_vllm():
    found = engine_memory(recipe_case("qwen2.5-32b"))
    assert found.sequences(10_000).value == pytest.approx(0.9 * found.cache_tokens.value / 10_000)
    assert found.sequences(10).value == MAX_SEQUENCES


def test_weights_that_do_not_fit_leave_no_cache():
    found = engine_memory(recipe_case("qwen2.5-32b", machine=toy_machine(device_bytes=16 * GIB)))
    assert found.cache_tokens.value == 0


def test_a_colocated_engine_gets_what_the_trainer_leaves():
    case = recipe_case("qwen2.5-7b-math", *COLOCATED)
    found = engine_memory(case)
    parts = trainer_memory(case, 0).parts
    stays = ("weights", "gradients", "optimizer", "CUDA and libraries")
    assert found.trainer.value == pytest.approx(sum(parts[name].value for name in stays))
    left = 80 * GIB - found.trainer.value
    assert left < 0.85 * 80 * GIB
    assert found.cache_tokens.value == pytest.approx(
        (left - found.weights - found.other.value) / found.cache_bytes_per_token
    )
    small = engine_memory(recipe_case("qwen2.5-7b-math", *COLOCATED, "rollout.gpu_memory_share=0.5"))
    assert small.cache_tokens.value < found.cache_tokens.value


def test_engines_hold_all_experts():
    """Each expert is sharded over the engine's ranks; routers and norms are on all of them."""
    case = recipe_case("qwen3-30b-a3b")
    parameters = case.family.parameters(case.architecture)
    replicated = 48 * (128 * 2048 + 2 * 2048 + 2 * 128) + 2048
    assert engine_memory(case).weights == 2 * (replicated + (parameters - replicated) / 2)


def test_a_prefill_holds_the_output_of_every_expert_of_a_token():
    case = recipe_case("qwen3-30b-a3b")
    dense = replace(case.architecture, ffn_hidden_size=8 * 768, experts=None)
    more = engine_memory(case).other.value - engine_memory(replace(case, architecture=dense)).other.value
    assert more == 8192 * 8 * 2048 * 2
