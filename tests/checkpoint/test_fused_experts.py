"""Folders in which a tensor has all experts of a layer: the same model as with a tensor per expert, or one sentence."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch._dynamo  # imported before ranks are forked
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_fipo.checkpoint.convert.convert import to_hf, to_megatron
from megatron_fipo.checkpoint.hf_export import iterate_hf_tensors
from megatron_fipo.checkpoint.model_folder import open_model_folder
from megatron_fipo.config import ParallelConfig
from megatron_fipo.engine.model_folder import load_model
from megatron_fipo.errors import UserError
from megatron_fipo.families.fused_experts import compact, is_fused, separate
from tests.checkpoint.conftest import no_progress
from tests.checkpoint.editing import write
from tests.checkpoint.test_convert import assert_same, tensors_of
from tests.model.reference import build
from tests.ranks import run_ranks
from tests.tiny_qwen2 import END, save_tokenizer

MODELS = ("qwen3_moe", "qwen3_moe-mixed")
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"
DOWN = "model.layers.1.mlp.experts.down_proj"


@pytest.fixture
def fused(sources, tmp_path):
    """Write the model of a separate folder with fused experts."""

    def write(model: str, sharded: bool) -> Path:
        target = tmp_path / "fused"
        loaded = AutoModelForCausalLM.from_pretrained(sources(model, "untied"))
        loaded.save_pretrained(
            target, save_original_format=False, max_shard_size="100KB" if sharded else "1GB"
        )
        return target

    return write


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_fused_experts_are_read_as_those_of_separate_tensors(sources, fused, model, sharded):
    folder, expected = fused(model, sharded), tensors_of(sources(model, "untied"))
    assert (len(list(folder.glob("*.safetensors"))) > 2) == sharded
    assert any(is_fused(name) for name in tensors_of(folder))
    source = open_model_folder(folder).source
    assert_same({name: source.slice(name)[:] for name in source.tensors}, expected)
    parallel = ParallelConfig(
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        expert_model_parallel_size=1 if sharded else 2,
        expert_tensor_parallel_size=2 if sharded else 1,
    )

    def body(rank, world):
        return {
            name: tensor for name, tensor in iterate_hf_tensors(build(folder, parallel)) if tensor is not None
        }

    assert_same(run_ranks(2, body)[0], expected)


@pytest.mark.parametrize("sharded", [False, True])
def test_fused_experts_convert_to_separate_ones_bit_for_bit(sources, fused, tmp_path, sharded):
    to_megatron(fused("qwen3_moe-mixed", sharded), tmp_path / "converted", "keep", no_progress)
    to_hf(tmp_path / "converted", tmp_path / "back", "keep", no_progress)
    assert_same(tensors_of(tmp_path / "back"), tensors_of(sources("qwen3_moe-mixed", "untied")))


@pytest.mark.parametrize("model", MODELS)
def test_transformers_reads_both_forms_as_the_same_model(sources, fused, model):
    folders = (sources(model, "untied"), fused(model, sharded=True))
    one, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    assert_same(dict(other.state_dict()), dict(one.state_dict()))
    ids = torch.arange(40)[None]
    assert torch.equal(one(ids).logits, other(ids).logits)


def test_slices_of_experts_are_ranges_of_their_rows(fused):
    folder = fused("qwen3_moe", sharded=True)
    source, tensors = open_model_folder(folder).source, separate(tensors_of(folder))
    for name in (
        "model.layers.3.mlp.experts.2.up_proj.weight",
        "model.layers.0.mlp.experts.3.down_proj.weight",
    ):
        values, part = tensors[name], source.slice(name)
        assert part.get_shape() == list(values.shape)
        assert torch.equal(part[3:7], values[3:7])
        assert torch.equal(part[:, 5:9], values[:, 5:9])
        assert part[:, 5:9].is_contiguous()
        assert part[7:7].shape == (0, values.shape[1])
    name = "model.layers.0.mlp.experts.1.gate_proj.weight"
    assert not source.equal(name, name.replace(".1.", ".2."))
    assert source.equal(name, name)


def edit_tensors(change):
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        write(folder, tensors)

    return edit


def set_config(**values):
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def replace_fused(name: str, change):
    return edit_tensors(lambda tensors: tensors.update({name: change(tensors[name]).contiguous()}))


EXPERT = "model.layers.1.mlp.experts.2.down_proj.weight"


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (
            replace_fused(GATE_UP, lambda tensor: tensor[:, :-1]),
            rf"^{GATE_UP} in .* has shape \[4, 79, 64\]; config.json requires \[4, 80, 64\]$",
        ),
        (
            replace_fused(GATE_UP, lambda tensor: tensor.mT),
            rf"^{GATE_UP} in .* has shape \[4, 64, 80\]; config.json requires \[4, 80, 64\]$",
        ),
        (
            replace_fused(DOWN, lambda tensor: tensor[:3]),
            rf"^{DOWN} in .* has shape \[3, 64, 40\]; config.json requires \[4, 64, 40\]$",
        ),
        (
            replace_fused(DOWN, lambda tensor: tensor.flatten(0, 1)),
            rf"^{DOWN} in .* has shape \[256, 40\]; config.json requires \[4, 64, 40\]$",
        ),
        (
            replace_fused(DOWN, lambda tensor: tensor.to(torch.float8_e4m3fn)),
            rf"^{DOWN} in .* is stored as F8_E4M3; convert it to bfloat16 or float32 first$",
        ),
        (
            set_config(num_experts=8, num_local_experts=8),
            r"^model.layers.0.mlp.experts.down_proj in .* has shape \[4, 64, 40\]; config.json requires \[8, 64, 40\]$",
        ),
        (
            set_config(mlp_only_layers=[1]),
            rf"^{DOWN} in .* has shape \[4, 64, 40\]; config.json requires no experts in this layer$",
        ),
        (
            edit_tensors(lambda tensors: tensors.update({EXPERT: tensors[DOWN][2]})),
            rf"^.*/fused has experts in two forms, {DOWN} and {EXPERT}; remove the one that is not the model$",
        ),
        (
            edit_tensors(lambda tensors: tensors.pop(DOWN)),
            r"^model folder .* lacks model.layers.1.mlp.experts.{0-3}.down_proj.weight$",
        ),
    ],
)
def test_other_fused_tensors_are_refused_by_name(fused, edit, reason):
    folder = fused("qwen3_moe", sharded=False)
    edit(folder)
    with pytest.raises(UserError, match=reason):
        open_model_folder(folder)


def test_missing_and_surplus_experts_are_named_in_one_short_sentence(sources, tmp_path):
    source, folder = sources("qwen3_moe", "untied"), tmp_path / "folder"
    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    for count, reason in (
        (
            16,
            r"lacks model.layers.0.mlp.experts.{4-15}.down_proj.weight, "
            r"model.layers.0.mlp.experts.{4-15}.gate_proj.weight, .* and 7 more$",
        ),
        (
            3,
            r"has model.layers.0.mlp.experts.3.down_proj.weight, .* and 7 more, not expected by its config.json$",
        ),
    ):
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_bytes((source / "config.json").read_bytes())
        set_config(num_experts=count, num_local_experts=count)(folder)
        with pytest.raises(UserError, match=reason) as error:
            open_model_folder(folder)
        assert len(str(error.value)) < 500 + len(str(folder))


def test_names_of_experts_are_compact_in_messages():
    name = "model.layers.0.mlp.experts.{}.up_proj.weight"
    assert compact(["model.norm.weight", name.format(7)]) == [name.format(7), "model.norm.weight"]
    assert compact(name.format(expert) for expert in range(128)) == [name.format("{0-127}")]
    assert compact(name.format(expert) for expert in (9, 0, 1, 2, 11, 13, 15)) == [
        name.format("{0-2, 9, 11 and 2 more}")
    ]


def test_the_engine_reads_both_forms(sources, fused, tmp_path):
    separate_folder = Path(shutil.copytree(sources("qwen3_moe", "untied"), tmp_path / "separate"))
    models = []
    for folder in (separate_folder, fused("qwen3_moe", sharded=True)):
        save_tokenizer(folder)
        set_config(eos_token_id=END)(folder)
        models.append(load_model(str(folder), "float32", False, load_weights=True)[0])
    assert_same(*(separate(model.state_dict()) for model in models))


def test_values_that_are_not_finite_are_found_in_fused_tensors(fused):
    folder = fused("qwen3_moe", sharded=False)

    def edit(tensors):
        tensors[DOWN][2, 5, 5] = torch.nan

    edit_tensors(edit)(folder)
    with pytest.raises(AssertionError, match=f"{EXPERT} in .* has NaN or infinite values"):
        run_ranks(1, lambda rank, world: build(folder, ParallelConfig()))
