"""Published configs give the published parameter counts, and every weight divides over the ranks of a large layout."""

import json
from math import prod
from pathlib import Path

import pytest
import torch

from megatron_fipo.checkpoint.shard_layouts import join, shard
from megatron_fipo.config import ParallelConfig
from megatron_fipo.config.divisibility import check_divisibility
from megatron_fipo.families.family import Experts
from megatron_fipo.families.registry import find_family

CONFIGS = Path(__file__).parent.parent / "fixtures" / "configs"
PARAMETERS = {
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-32b": 32_762_123_264,
    "llama-3.1-70b": 70_553_706_496,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
}
DENSE = tuple(name for name in PARAMETERS if "-a" not in name)
LAYOUTS = {
    **dict.fromkeys(DENSE, ParallelConfig(tensor_model_parallel_size=8, pipeline_model_parallel_size=4)),
    "qwen3-30b-a3b": ParallelConfig(
        tensor_model_parallel_size=4,
        sequence_parallel=True,
        pipeline_model_parallel_size=4,
        data_parallel_size=8,
        expert_model_parallel_size=16,
        expert_tensor_parallel_size=2,
    ),
    "qwen3-235b-a22b": ParallelConfig(
        tensor_model_parallel_size=4,
        sequence_parallel=True,
        pipeline_model_parallel_size=2,
        data_parallel_size=8,
        expert_model_parallel_size=32,
    ),
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
def test_every_weight_splits_over_tensor_parallel_ranks_and_comes_back(name):
    """With shapes only (meta tensors)."""
    family, architecture = read(name)
    parallel = LAYOUTS[name]
    check_divisibility(architecture, parallel)
    first_layer_and_ends = [weight for weight in family.weights(architecture) if weight.layer in (None, 0)]
    for weight in first_layer_and_ends:
        size = (
            parallel.tensor_model_parallel_size
            if weight.expert is None
            else parallel.expert_tensor_parallel_size
        )
        parts = [torch.empty(shape, device="meta") for shape in weight.shapes]
        shards = [shard(weight, parts, architecture, rank, size) for rank in range(size)]
        assert {prod(piece.shape) for piece in shards} == {weight.parameters_per_rank(size)}, weight
        assert tuple(tuple(part.shape) for part in join(weight, shards, architecture)) == weight.shapes, (
            weight
        )


@pytest.mark.parametrize(("name", "width"), [("qwen3-30b-a3b", 768), ("qwen3-235b-a22b", 1536)])
def test_every_layer_of_a_published_mixture_has_its_experts(name, width):
    family, architecture = read(name)
    assert architecture.experts == Experts(128, 8, width, normalized=True)
    assert architecture.qk_layernorm
    names = [name for weight in family.weights(architecture) for name in weight.names]
    assert len(names) == len(set(names)) == 3 + architecture.num_layers * (9 + 128 * 3)


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
