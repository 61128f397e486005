"""Experts in Megatron-Core's format: every layout reads what `convert` writes, and `convert` what every layout writes."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch._dynamo  # imported before ranks are forked
from torch.distributed.checkpoint import FileSystemReader

from megatron_fipo.checkpoint.convert.convert import to_hf
from megatron_fipo.checkpoint.convert.stacking import Place, place_of
from megatron_fipo.checkpoint.convert.torch_dist import WeightsReader
from megatron_fipo.checkpoint.distributed import load_weights_only
from megatron_fipo.checkpoint.hf_export import iterate_hf_tensors
from megatron_fipo.config import ModelConfig, ParallelConfig
from megatron_fipo.families.registry import read_model_config
from megatron_fipo.model import parallel as model_parallel
from megatron_fipo.model.build import build_model
from tests.checkpoint.conftest import no_progress
from tests.checkpoint.test_convert import assert_same, save_a_run, tensors_of
from tests.ranks import run_ranks

MODELS = ("qwen3_moe", "qwen3_moe-mixed")
EP2 = {"expert_model_parallel_size": 2}
SP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "1": {},
    "dp2-ep2": {"data_parallel_size": 2, **EP2},
    "tp2": {**SP2},
    "tp2-ep2": {**SP2, **EP2},
    "tp2-etp2": {**SP2, "expert_tensor_parallel_size": 2},
    "pp2": {**PP2},
    "pp2-dp2-ep2": {**PP2, "data_parallel_size": 2, **EP2},
    "pp2-vpp2-cp2-ep2": {
        **PP2,
        "virtual_pipeline_model_parallel_size": 2,
        "context_parallel_size": 2,
        **EP2,
    },
}


@pytest.mark.parametrize("layout", ["1", "dp2-ep2", "tp2-ep2", "tp2-etp2", "pp2", "pp2-vpp2-cp2-ep2"])
@pytest.mark.parametrize("model", MODELS)
def test_every_layout_loads_a_converted_model_bit_for_bit(sources, checkpoints, model, layout):
    folder, parallel = checkpoints(model, "untied"), ParallelConfig(**LAYOUTS[layout])

    def body(rank, world):
        torch.set_num_threads(1)
        model_parallel.initialize(parallel, seed=1)
        chunks = build_model(folder / "hf", ModelConfig(path=str(folder), dtype="float32"), parallel)
        load_weights_only(chunks, folder / "weights")
        return {name: tensor for name, tensor in iterate_hf_tensors(chunks) if tensor is not None}

    found, *others = run_ranks(parallel.world_size, body)
    assert_same(found, tensors_of(sources(model, "untied")))
    assert not any(others)


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        *(("qwen3_moe", layout) for layout in ("1", "dp2-ep2", "tp2", "tp2-ep2", "tp2-etp2", "pp2-dp2-ep2")),
        *(("qwen3_moe-mixed", layout) for layout in ("tp2-ep2", "pp2-vpp2-cp2-ep2")),
    ],
)
def test_a_checkpoint_of_a_run_becomes_the_model_bit_for_bit(sources, tmp_path, model, layout):
    source = sources(model, "untied")
    folder = save_a_run(source, tmp_path / "iteration_000003", ParallelConfig(**LAYOUTS[layout]))
    stored = FileSystemReader(folder / "weights").read_metadata().state_dict_metadata
    assert any(key.startswith("optimizer.") for key in stored)
    to_hf(folder, tmp_path / "back", "keep", no_progress)
    assert_same(tensors_of(tmp_path / "back"), tensors_of(source))


@pytest.mark.parametrize("model", MODELS)
def test_the_stored_pieces_of_a_tensor_are_each_of_one_weight(checkpoints, model):
    folder = checkpoints(model, "untied")
    family, architecture = read_model_config(folder / "hf")
    reader, found = WeightsReader(folder / "weights"), Counter()
    for weight in family.weights(architecture):
        place = place_of(weight, architecture)
        chunks = reader.chunks(place)
        assert all(tuple(chunk.offsets)[: len(place.index)] == place.index for chunk in chunks)
        found[place.key] += len(chunks)
    assert found == {key: len(stored.chunks) for key, stored in reader.tensors.items()}
    assert max(found.values()) >= 4 * 4


def test_places_of_stacked_layers_and_experts(sources):
    family, architecture = read_model_config(sources("qwen3_moe", "untied"))
    places = {weight.megatron: place_of(weight, architecture) for weight in family.weights(architecture)}
    expert = places["decoder.layers.2.mlp.experts.local_experts.3.linear_fc1.weight"]
    assert expert == Place("decoder.layers.mlp.experts.experts.linear_fc1.weight", (2, 3), (4, 4))
    assert (
        expert.extra_state_key == "decoder.layers.mlp.experts.experts.linear_fc1._extra_state/shard_2.3_4.4"
    )
    assert places["decoder.layers.3.mlp.router.weight"] == Place(
        "decoder.layers.mlp.router.weight", (3,), (4,)
    )
    assert places["decoder.final_layernorm.weight"] == Place("decoder.final_layernorm.weight", (), ())


def test_places_if_some_layers_are_dense(sources):
    family, architecture = read_model_config(sources("qwen3_moe-mixed", "untied"))
    places = {weight.megatron: place_of(weight, architecture) for weight in family.weights(architecture)}
    expert = places["decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight"]
    assert expert == Place("decoder.layers.1.mlp.experts.experts.linear_fc2.weight", (3,), (4,))
    assert expert.extra_state_key == "decoder.layers.1.mlp.experts.experts.linear_fc2._extra_state/shard_3_4"
    dense = places["decoder.layers.0.mlp.linear_fc2.weight"]
    assert dense == Place("decoder.layers.0.mlp.linear_fc2.weight", (), ())
    assert dense.extra_state_key == "decoder.layers.0.mlp.linear_fc2._extra_state/shard_0_1"
