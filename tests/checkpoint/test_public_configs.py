"""Published configs give the published parameter counts, and every weight divides over 8 ranks."""

import json
from math import prod
from pathlib import Path

import pytest
import torch

from megatron_fipo.checkpoint.shard_layouts import join, shard
from megatron_fipo.config import ParallelConfig
from megatron_fipo.config.divisibility import check_divisibility
from megatron_fipo.families.registry import find_family

CONFIGS = Path(__file__).parent.parent / "fixtures" / "configs"
PARAMETERS = {
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-32b": 32_762_123_264,
    "llama-3.1-70b": 70_553_706_496,
}


def read(name: str):
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    family = find_family(config)
    return family, family.translate(config)


def test_every_config_is_checked():
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_number_of_parameters_is_the_published_one(name):
    family, architecture = read(name)
    assert family.parameters(architecture) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_weight_splits_over_8_tensor_parallel_ranks_and_comes_back(name):
    """With shapes only (meta tensors)."""
    family, architecture = read(name)
    parallel = ParallelConfig(tensor_model_parallel_size=8, pipeline_model_parallel_size=4)
    check_divisibility(architecture, parallel)
    first_layer_and_ends = [weight for weight in family.weights(architecture) if weight.layer in (None, 0)]
    for weight in first_layer_and_ends:
        parts = [torch.empty(shape, device="meta") for shape in weight.shapes]
        shards = [shard(weight, parts, architecture, rank, 8) for rank in range(8)]
        assert {prod(piece.shape) for piece in shards} == {weight.parameters_per_rank(8)}, weight
        assert tuple(tuple(part.shape) for part in join(weight, shards, architecture)) == weight.shapes, (
            weight
        )


def test_llama_keeps_its_rotary_scaling():
    _, architecture = read("llama-3.1-70b")
    assert (architecture.rotary_base, architecture.rope_scaling_factor) == (500000.0, 8.0)
    assert not architecture.add_qkv_bias
    assert not architecture.qk_layernorm


def test_qwen3_has_head_norms_and_heads_wider_than_its_hidden_size():
    _, architecture = read("qwen3-32b")
    assert architecture.qk_layernorm
    assert not architecture.add_qkv_bias
    assert architecture.kv_channels * architecture.num_attention_heads == 8192 > architecture.hidden_size
    assert architecture.rope_scaling_factor == 1.0
