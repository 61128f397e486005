"""Conversion is lossless, loads in any layout, and needs little memory.

Invalid input: test_convert_errors.py.
"""

import json
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # imported before ranks are forked
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoModelForCausalLM

from megatron_fipo.checkpoint import hf_writer
from megatron_fipo.checkpoint.companions import copy_companions
from megatron_fipo.checkpoint.convert import pieces, torch_dist
from megatron_fipo.checkpoint.convert.convert import to_hf, to_megatron
from megatron_fipo.checkpoint.distributed import CheckpointWriter, load_weights_only
from megatron_fipo.checkpoint.manifest import (
    check_files,
    hash_files,
    list_files,
    read_manifest,
    write_manifest,
)
from megatron_fipo.cli.convert import progress_display
from megatron_fipo.cli.main import main
from megatron_fipo.config import ModelConfig, ParallelConfig
from megatron_fipo.errors import UserError
from megatron_fipo.families.fused_experts import separate
from megatron_fipo.model import parallel as model_parallel
from megatron_fipo.model.build import build_model
from megatron_fipo.trainer.rank_model import RankModel
from tests.checkpoint.conftest import no_progress
from tests.checkpoint.test_convert_errors import change
from tests.distributed.tiny import settings, write_model
from tests.model import reference
from tests.model.reference import FAMILIES, gather_logits, logits_of_rank, make_reference, sequences
from tests.ranks import run_ranks

CASES = [(family, tied) for family in FAMILIES for tied in ("untied", "tied")]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype is tensor.dtype
        assert torch.equal(found[name], tensor), name


# Lossless


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_a_model_comes_back_bit_for_bit(sources, checkpoints, tmp_path, monkeypatch, family, tied):
    monkeypatch.setattr(hf_writer, "SHARD_BYTES", 100_000)
    source = sources(family, tied)
    to_hf(checkpoints(family, tied), tmp_path / "back", "keep", no_progress)
    expected = tensors_of(source)
    assert_same(tensors_of(tmp_path / "back"), expected)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["weight_map"] == {
        name: file.name for file in (tmp_path / "back").glob("*.safetensors") for name in load_file(file)
    }
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "back" / "optimizer.pt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["back"]


def load_and_listen(folder: Path) -> tuple[Any, dict, list[str]]:
    """transformers' model, its loading report, and its warnings."""
    logged: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    return *loaded, logged


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_transformers_loads_the_result_without_a_warning(sources, checkpoints, tmp_path, family, tied):
    """Except its warning about the tiny Llama's config, which the original folder gives too."""
    to_hf(checkpoints(family, tied), tmp_path / "back", "keep", no_progress)
    model, report, logged = load_and_listen(tmp_path / "back")
    assert logged == load_and_listen(sources(family, tied))[2]
    assert family == "llama" or not logged
    assert not any(report.values())
    loaded = separate(model.state_dict())
    for name, tensor in tensors_of(sources(family, tied)).items():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_of_megatron_s_own_checkpoints(sources, checkpoints, tmp_path, family):
    """Also the extra states, which `dist_checkpointing.load` of another program requires.

    The common state, which Megatron-Core 0.19 stores with the data, stays a separate file, which every
    release reads.
    """
    from megatron.core import dist_checkpointing

    (tmp_path / "own").mkdir()

    def body(rank, world):
        chunk: Any = reference.build(sources(family, "untied"), ParallelConfig())[0]
        dist_checkpointing.save(chunk.sharded_state_dict(), str(tmp_path / "own"))
        loaded = dist_checkpointing.load(
            {"model": chunk.sharded_state_dict()}, str(checkpoints(family, "untied") / "weights")
        )
        chunk.load_state_dict(loaded["model"])  # strict

    run_ranks(1, body)
    own, converted = (
        {
            key: (tuple(entry.size), entry.properties.dtype)
            if isinstance(entry, TensorStorageMetadata)
            else None
            for key, entry in FileSystemReader(folder).read_metadata().state_dict_metadata.items()
        }
        for folder in (tmp_path / "own", checkpoints(family, "untied") / "weights")
    )
    own.pop("common_state/shard_0_1", None)
    assert converted == own


def load_converted(monkeypatch, checkpoint: Path) -> None:
    """Make `logits_of_rank` build its model with the weights of a checkpoint, starting from other weights."""

    def build(folder, parallel, dtype="float32"):
        model_parallel.initialize(parallel, seed=1)
        chunks = build_model(checkpoint / "hf", ModelConfig(path=str(folder), dtype=dtype), parallel)
        load_weights_only(chunks, checkpoint / "weights")
        return chunks

    monkeypatch.setattr(reference, "build", build)


PARALLEL_LAYOUTS = {
    "tp2": ParallelConfig(tensor_model_parallel_size=2),
    "tp2_sp_ep2": ParallelConfig(
        tensor_model_parallel_size=2, sequence_parallel=True, expert_model_parallel_size=2
    ),
    "pp2": ParallelConfig(pipeline_model_parallel_size=2),
    "tp2_pp2_vpp2": ParallelConfig(2, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
}


@pytest.mark.parametrize(
    ("family", "tied", "layout"),
    [
        *(
            (family, tied, layout)
            for family, tied in CASES
            for layout in ("tp2_sp_ep2" if "moe" in family else "tp2", "pp2")
        ),
        ("qwen2", "untied", "tp2_pp2_vpp2"),
        ("qwen2", "tied", "tp2_pp2_vpp2"),
    ],
)
def test_logits_of_a_loaded_checkpoint_equal_those_of_transformers(
    sources, checkpoints, monkeypatch, family, tied, layout
):
    folder, parallel = sources(family, tied), PARALLEL_LAYOUTS[layout]
    load_converted(monkeypatch, checkpoints(family, tied))
    results = run_ranks(parallel.world_size, lambda rank, world: logits_of_rank(folder, parallel))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = torch.cat([model(sequence[None]).logits[0] for sequence in sequences()])
    torch.testing.assert_close(
        gather_logits(results, parallel.tensor_model_parallel_size), expected, atol=1e-5, rtol=1e-5
    )


def test_a_vocabulary_that_is_padded_comes_back_without_its_padding(tmp_path, monkeypatch):
    """1,100 rows: 1,152 in the checkpoint, Megatron's padding for one rank; 1,280 in memory for two ranks."""
    monkeypatch.setattr(reference, "VOCAB", 1100)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 100_000)
    model = make_reference(tmp_path / "source")
    to_megatron(tmp_path / "source", tmp_path / "checkpoint", "keep", no_progress)
    stored = FileSystemReader(tmp_path / "checkpoint" / "weights").read_metadata().state_dict_metadata
    assert tuple(stored["output_layer.weight"].size) == (1152, 64)  # type: ignore[union-attr]
    to_hf(tmp_path / "checkpoint", tmp_path / "back", "keep", no_progress)
    assert_same(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "source"))
    load_converted(monkeypatch, tmp_path / "checkpoint")
    results = run_ranks(2, lambda rank, world: logits_of_rank(tmp_path / "source", PARALLEL_LAYOUTS["tp2"]))
    with torch.no_grad():
        expected = torch.cat([model(sequence[None]).logits[0] for sequence in sequences()])
    torch.testing.assert_close(gather_logits(results, 2), expected, atol=1e-5, rtol=1e-5)


def save_a_run(source: Path, folder: Path, parallel: ParallelConfig) -> Path:
    """A checkpoint of a run, with an optimizer."""
    for name in ("weights", "hf", "rng"):
        (folder / name).mkdir(parents=True)
    copy_companions(source, folder / "hf")

    def body(rank, world):
        torch.set_num_threads(1)
        model_parallel.initialize(parallel, seed=1)
        policy = RankModel(**settings(source, parallel), device=torch.device("cpu"))
        policy.load_hf(source)
        CheckpointWriter().start(policy.modules, policy.optimizer, folder / "weights", asynchronous=False)

    run_ranks(parallel.world_size, body)
    write_manifest(folder, hash_files(folder, list_files(folder)), {"iteration": 3})
    return folder


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(tensor_model_parallel_size=2, data_parallel_size=2),
        ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    ],
    ids=["tp2_dp2", "pp2_vpp2"],
)
def test_the_model_of_a_run_s_checkpoint_is_read_and_its_optimizer_left(tmp_path, parallel):
    source = write_model(tmp_path / "source")
    folder = save_a_run(source, tmp_path / "iteration_000003", parallel)
    to_hf(folder, tmp_path / "back", "keep", no_progress)
    assert_same(tensors_of(tmp_path / "back"), tensors_of(source))


def test_the_same_model_gives_the_same_files_with_a_manifest_that_holds(sources, tmp_path):
    for name in ("one", "two"):
        to_megatron(sources("qwen2", "tied"), tmp_path / name, "keep", no_progress)
    one, two = (read_manifest(tmp_path / name) for name in ("one", "two"))
    assert one == two
    assert check_files(tmp_path / "one", one.files) == []
    assert {
        "weights/.metadata",
        "weights/metadata.json",
        "weights/common.pt",
        "hf/tokenizer.json",
    } < one.files.keys()


# Dtypes


def test_bfloat16_stays_bfloat16(source, tmp_path):
    change(
        source, lambda tensors: tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})
    )
    assert to_megatron(source, tmp_path / "converted", "keep", no_progress).rounded == set()
    to_hf(tmp_path / "converted", tmp_path / "back", "keep", no_progress)
    assert_same(tensors_of(tmp_path / "back"), tensors_of(source))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"
    to_hf(tmp_path / "converted", tmp_path / "wide", "float32", no_progress)
    assert_same(
        tensors_of(tmp_path / "wide"), {name: tensor.float() for name, tensor in tensors_of(source).items()}
    )


def test_rounding_happens_when_asked_for_and_is_told(source, tmp_path, capsys):
    change(source, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64)}))
    command = ["convert", "to-megatron", str(source), "--dtype", "bfloat16", str(tmp_path / "converted")]
    assert main(command) == 0
    printed, progress = capsys.readouterr()
    assert re.search(r"wrote .*: 51 tensors, .* kB in .* s", printed)
    assert re.search(r"converting: (\d+\.\d kB) of \1 in \d+ s\nhashing: ", progress)
    assert (
        "rounded to the dtype asked for: 30 of Megatron's parameters" in printed
    )  # all but the norm of ones
    to_hf(tmp_path / "converted", tmp_path / "back", "keep", no_progress)
    assert_same(
        tensors_of(tmp_path / "back"),
        {name: tensor.bfloat16() for name, tensor in tensors_of(source).items()},
    )


def test_parameters_of_several_dtypes_each_keep_theirs(source, tmp_path):
    def edit(tensors):
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items() if "norm" not in name})

    change(source, edit)
    to_megatron(source, tmp_path / "converted", "keep", no_progress)
    to_hf(tmp_path / "converted", tmp_path / "back", "keep", no_progress)
    assert_same(tensors_of(tmp_path / "back"), tensors_of(source))


def half(name: str):
    return lambda tensors: tensors.update({name: tensors[name].half()})


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (
            half("model.norm.weight"),
            "model.norm.weight is stored as float16, which is not supported; --dtype float32 is exact, "
            "--dtype bfloat16 drops 3 of 10 mantissa bits",
        ),
        (
            lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].double()}),
            "--dtype float32 drops 29 of 52 mantissa bits, --dtype bfloat16 drops 45 of 52",
        ),
        (
            lambda tensors: tensors.update(
                {(name := "model.layers.2.mlp.up_proj.weight"): tensors[name].bfloat16()}
            ),
            "model.layers.2.mlp.up_proj.weight in .* is stored as bfloat16 and "
            "model.layers.0.mlp.gate_proj.weight as float32, but in Megatron they are one tensor; "
            "--dtype float32 keeps every bit",
        ),
        (
            lambda tensors: tensors.update(
                {"model.norm.weight": tensors["model.norm.weight"].to(torch.float8_e4m3fn)}
            ),
            "model.norm.weight in .* is stored as F8_E4M3; convert it",
        ),
    ],
)
def test_a_dtype_that_cannot_be_kept_is_refused_with_what_would_be_lost(source, tmp_path, edit, reason):
    change(source, edit)
    with pytest.raises(UserError, match=reason):
        to_megatron(source, tmp_path / "converted", "keep", no_progress)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_float16_becomes_float32_exactly_when_asked_for(source, tmp_path):
    change(source, half("model.norm.weight"))
    assert to_megatron(source, tmp_path / "converted", "float32", no_progress).rounded == set()


def test_a_terminal_gets_a_bar_and_everything_else_lines_with_the_time_left(monkeypatch, capsys):
    with progress_display(line_every_s=0.0) as update:
        update("converting", 0, 4_000_000)
        update("converting", 1_000_000, 4_000_000)
    assert "converting: 1.0 MB of 4.0 MB in 0 s, 0 s left\n" in capsys.readouterr().err
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with progress_display() as update:
        update("converting", 1_000_000, 4_000_000)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert re.search(r"converting ━+.* 1\.0/4\.0 MB .* -:--:--", shown)


# Memory


def peak_bytes(run) -> int:
    """Peak growth of the resident set during `run`."""

    def kilobytes(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(dict(line.split(":") for line in lines)[field].split()[0])

    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run()
    return (kilobytes("VmHWM") - before) * 1024


def test_memory_does_not_grow_with_the_model(tmp_path, monkeypatch):
    """8 and 64 layers of 2.6 MB in float32; the complete second model is 160 MB."""
    monkeypatch.setattr(torch_dist, "WORKERS", 1)
    peaks = {}
    for layers in (8, 64):
        folder = tmp_path / str(layers)
        make_reference(folder / "hf", hidden_size=256, intermediate_size=512, num_hidden_layers=layers)
        up = peak_bytes(lambda folder=folder: to_megatron(folder / "hf", folder / "meg", "keep", no_progress))
        down = peak_bytes(lambda folder=folder: to_hf(folder / "meg", folder / "back", "keep", no_progress))
        peaks[layers] = (up, down)
        size = (folder / "hf" / "model.safetensors").stat().st_size
    assert size > 150e6
    assert max(peaks[64]) < max(peaks[8]) + 16e6 < 60e6, peaks
