"""Hugging Face -> Megatron-Core -> Hugging Face is lossless in every layout; invalid folders are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_fipo.checkpoint import hf_writer
from megatron_fipo.checkpoint.convert.stacking import place_of
from megatron_fipo.checkpoint.hf_export import iterate_hf_tensors, save_hf
from megatron_fipo.checkpoint.hf_import import load_hf_weights
from megatron_fipo.config import ParallelConfig
from megatron_fipo.errors import UserError
from megatron_fipo.families.fused_experts import separate
from tests.model.reference import FAMILIES, build, make_reference
from tests.ranks import run_ranks

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2_vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "tp2_pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "tp2_cp2": {"tensor_model_parallel_size": 2, "context_parallel_size": 2},
}
EXPERT_LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "cp2_ep2": {"context_parallel_size": 2, "expert_model_parallel_size": 2},
    "tp2_ep2_etp2": {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "data_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 2,
    },
    "tp2_pp2_ep2": {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "pipeline_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
    },
}


OTHER_LAYOUTS = ("one", "tp2", "tp2_pp2")
"""For the families that differ from Qwen2 only in their table."""
CASES = [
    *(("qwen2", tied, layout) for tied in ("untied", "tied") for layout in LAYOUTS),
    *((family, "untied", layout) for family in ("qwen3", "llama") for layout in OTHER_LAYOUTS),
    *((family, "tied", "tp2_pp2") for family in ("qwen3", "llama")),
    *(("qwen3_moe", "untied", layout) for layout in EXPERT_LAYOUTS),
    *(("qwen3_moe-mixed", "tied", layout) for layout in ("tp2_ep2_etp2", "tp2_pp2_ep2")),
]


@pytest.fixture(scope="module", params=["untied", "tied"])
def source(request, sources) -> Path:
    return sources("qwen2", request.param)


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("untied")
    make_reference(folder)
    return folder


def copy_model(source: Path, change=None) -> Path:
    """A folder next to `source` with the same model, its tensors modified by `change`."""
    target = source.parent / f"{source.name}_changed"
    target.mkdir(exist_ok=True)
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    if change:
        change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


def load_on_one_rank(source: Path, weights: Path) -> None:
    """Build from `source`'s config, then load `weights`.

    A UserError becomes an AssertionError with its message.
    """
    run_ranks(1, lambda rank, world: load_hf_weights(build(source, ParallelConfig()), weights))


@pytest.mark.parametrize(("family", "tied", "layout"), CASES)
def test_every_tensor_comes_back_bit_for_bit(sources, tmp_path, family, tied, layout):
    source, parallel = sources(family, tied), ParallelConfig(**{**LAYOUTS, **EXPERT_LAYOUTS}[layout])

    def body(rank, world):
        save_hf(build(source, parallel), source, tmp_path / "saved")

    run_ranks(parallel.world_size, body)
    before, after = (
        load_file(source / "model.safetensors"),
        load_file(tmp_path / "saved" / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {
        *(
            "model.safetensors",
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "chat_template.jinja",
        )
    }
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_all_ranks_see_the_same_names_and_only_the_first_the_tensors(source):
    parallel = ParallelConfig(tensor_model_parallel_size=2, data_parallel_size=2)

    def body(rank, world):
        return [
            (name, None if tensor is None else tuple(tensor.shape))
            for name, tensor in iterate_hf_tensors(build(source, parallel))
        ]

    first, *others = run_ranks(4, body)
    expected = {name: tuple(tensor.shape) for name, tensor in load_file(source / "model.safetensors").items()}
    assert dict(first) == expected
    for other in others:
        assert other == [(name, None) for name, _ in first]


@pytest.mark.parametrize(
    ("family", "tied"), [(family, tied) for family in FAMILIES for tied in ("untied", "tied")]
)
def test_transformers_reads_the_sharded_bfloat16_model(sources, tmp_path, monkeypatch, family, tied):
    source = sources(family, tied)
    monkeypatch.setattr(hf_writer, "SHARD_BYTES", 100_000)
    run_ranks(
        1,
        lambda rank, world: save_hf(
            build(source, ParallelConfig()), source, tmp_path / "saved", torch.bfloat16
        ),
    )
    shards = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(shard.stat().st_size < 110_000 for shard in shards)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", output_loading_info=True, dtype="auto"
    )
    model, report = loaded
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype is torch.bfloat16
    tensors = separate(model.state_dict())
    for name, tensor in load_file(source / "model.safetensors").items():
        assert torch.equal(tensors[name], tensor.bfloat16()), name


def test_sharded_folders_are_read(source, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_writer, "SHARD_BYTES", 100_000)

    def body(rank, world):
        chunks = build(source, ParallelConfig(tensor_model_parallel_size=2))
        save_hf(chunks, source, tmp_path / "saved")
        before = [parameter.detach().clone() for parameter in chunks[0].parameters()]
        with torch.no_grad():
            for parameter in chunks[0].parameters():
                parameter.zero_()
        load_hf_weights(chunks, tmp_path / "saved")
        return all(torch.equal(old, new) for old, new in zip(before, chunks[0].parameters(), strict=True))

    assert run_ranks(2, body) == [True, True]


def test_missing_and_unexpected_tensors_are_listed(untied):
    def change(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.1.self_attn.k_proj.bias"]
        tensors["model.layers.0.extra"] = torch.zeros(1)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(1)

    with pytest.raises(
        AssertionError,
        match=r"lacks model.layers.1.self_attn.k_proj.bias, model.norm.weight and "
        r"has model.layers.0.extra, not expected",
    ):
        load_on_one_rank(untied, copy_model(untied, change))


def test_a_wrong_shape_is_named(untied):
    def change(tensors):
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(95, 64)

    with pytest.raises(
        AssertionError,
        match=r"mlp.up_proj.weight in .* has shape \[95, 64\]; config.json requires \[96, 64\]",
    ):
        load_on_one_rank(untied, copy_model(untied, change))


def test_a_cut_file_is_named(untied):
    folder = copy_model(untied)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(
        AssertionError, match=r"UserError: .*model.safetensors is not a readable safetensors file"
    ):
        load_on_one_rank(untied, folder)


def test_a_missing_shard_is_named(untied, tmp_path):
    shutil.copyfile(untied / "config.json", tmp_path / "config.json")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"a": "model-00002-of-00002.safetensors"}})
    )
    with pytest.raises(AssertionError, match=r"UserError: .*lacks model-00002-of-00002.safetensors"):
        load_on_one_rank(untied, tmp_path)


def test_a_folder_without_safetensors_is_refused(untied, tmp_path):
    shutil.copyfile(untied / "config.json", tmp_path / "config.json")
    (tmp_path / "pytorch_model.bin").write_text("pickle")
    with pytest.raises(AssertionError, match="only safetensors are supported"):
        load_on_one_rank(untied, tmp_path)


def test_an_existing_target_is_left_alone_and_every_rank_is_told(untied, tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "precious").write_text("x")

    def body(rank, world):
        chunks = build(untied, ParallelConfig(pipeline_model_parallel_size=2))
        with pytest.raises(UserError, match="already exists"):
            save_hf(chunks, untied, tmp_path / "saved")

    run_ranks(2, body)
    assert [path.name for path in tmp_path.rglob("*")] == ["saved", "precious"]


def test_a_full_disk_leaves_nothing_and_every_rank_is_told(untied, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_writer, "SHARD_BYTES", 100_000)
    monkeypatch.setattr(hf_writer, "_write_at", full)

    def body(rank, world):
        chunks = build(untied, ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2))
        with pytest.raises(UserError, match="No space left on device"):
            save_hf(chunks, untied, tmp_path / "saved")

    run_ranks(4, body)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_distributed_checkpoints_use_the_names_that_transformer_engine_gives(sources, family):
    """The family table has those names, so portable norms must use them in checkpoints."""
    source = sources(family, "untied")

    def body(rank, world):
        chunk: Any = build(source, ParallelConfig())[0]
        state = chunk.sharded_state_dict()
        keys = {value.key for name, value in state.items() if not name.endswith("_extra_state")}
        return keys, {
            place_of(weight, chunk.architecture).key for weight in chunk.family.weights(chunk.architecture)
        }

    ((keys, names),) = run_ranks(1, body)
    assert keys == names
