"""Conversion loses nothing and is readable under any layout; bad input is one sentence and leaves nothing behind."""

import json
import logging
import re
import resource
import shutil
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # imported once, before ranks are forked
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoModelForCausalLM

from megatron_fipo.checkpoint import convert, hf_writer, megatron_checkpoint, moves
from megatron_fipo.checkpoint.convert import no_progress, to_hf, to_megatron
from megatron_fipo.checkpoint.distributed import CheckpointWriter, load_weights_only
from megatron_fipo.checkpoint.hf_writer import copy_companions
from megatron_fipo.checkpoint.manifest import check_files, hash_files, read_manifest, write_manifest
from megatron_fipo.cli import main
from megatron_fipo.config import ModelConfig, ParallelConfig
from megatron_fipo.convert_cli import Display
from megatron_fipo.errors import UserError
from megatron_fipo.model import parallel as model_parallel
from megatron_fipo.model.build import build_model
from megatron_fipo.trainer.policy import Policy
from tests.distributed.tiny import settings, write_model
from tests.model import reference
from tests.model.reference import FAMILIES, gather_logits, logits_of_rank, make_reference, sequences
from tests.ranks import run_ranks

CASES = [(family, tied) for family in FAMILIES for tied in ("untied", "tied")]


def write_source(folder: Path, family: str, tied: str) -> Path:
    make_reference(folder, tied == "tied", family)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "optimizer.pt").write_text("not wanted")
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """By family and whether embeddings are tied: a float32 model folder with companions, and one file that should not travel."""
    return cache(lambda family, tied: write_source(tmp_path_factory.mktemp(f"{family}-{tied}"), family, tied))


@pytest.fixture(scope="module")
def checkpoints(sources, tmp_path_factory):
    """The same, converted, with most weights in several pieces."""

    @cache
    def make(family: str, tied: str) -> Path:
        target = tmp_path_factory.mktemp(f"{family}-{tied}") / "converted"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(moves, "PIECE_BYTES", 7000)
            to_megatron(sources(family, tied), target, "keep", no_progress)
        return target

    return make


@pytest.fixture
def source(sources, tmp_path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(sources("qwen2", "untied"), tmp_path / "source"))


@pytest.fixture
def checkpoint(checkpoints, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoints("qwen2", "untied"), tmp_path / "checkpoint"))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype is tensor.dtype
        assert torch.equal(found[name], tensor), name


def change(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


# Nothing is lost


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
    """transformers' model, its loading report, and the warnings it gave."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    return *loaded, said


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_transformers_loads_the_result_without_a_warning(sources, checkpoints, tmp_path, family, tied):
    """But for what it says about the tiny Llama's config, wherever that lies."""
    to_hf(checkpoints(family, tied), tmp_path / "back", "keep", no_progress)
    model, report, said = load_and_listen(tmp_path / "back")
    assert said == load_and_listen(sources(family, tied))[2]
    assert family == "llama" or not said
    assert not any(report.values())
    for name, tensor in tensors_of(sources(family, tied)).items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_of_megatron_s_own_checkpoints(sources, checkpoints, tmp_path, family):
    """Extra states too: `dist_checkpointing.load` of another program asks for them."""
    from megatron.core import dist_checkpointing

    (tmp_path / "own").mkdir()

    def body(rank, world):
        chunk: Any = reference.build(sources(family, "untied"), ParallelConfig())[0]
        dist_checkpointing.save(chunk.sharded_state_dict(), str(tmp_path / "own"))
        loaded = dist_checkpointing.load({"model": chunk.sharded_state_dict()}, str(checkpoints(family, "untied") / "weights"))
        chunk.load_state_dict(loaded["model"])  # strict

    run_ranks(1, body)
    own, converted = (
        {
            key: (tuple(entry.size), entry.properties.dtype) if isinstance(entry, TensorStorageMetadata) else None
            for key, entry in FileSystemReader(folder).read_metadata().state_dict_metadata.items()
        }
        for folder in (tmp_path / "own", checkpoints(family, "untied") / "weights")
    )
    assert converted == own


def load_converted(monkeypatch, checkpoint: Path) -> None:
    """From now on `logits_of_rank` builds its model with the weights of a checkpoint, starting from others."""

    def build(folder, parallel, dtype="float32"):
        model_parallel.initialize(parallel, seed=1)
        chunks = build_model(checkpoint / "hf", ModelConfig(path=str(folder), dtype=dtype), parallel)
        load_weights_only(chunks, checkpoint / "weights")
        return chunks

    monkeypatch.setattr(reference, "build", build)


SPLITS = {
    "tp2": ParallelConfig(tensor_model_parallel_size=2),
    "pp2": ParallelConfig(pipeline_model_parallel_size=2),
    "tp2_pp2_vpp2": ParallelConfig(2, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
}


@pytest.mark.parametrize(
    ("family", "tied", "split"),
    [
        *((family, tied, split) for family, tied in CASES for split in ("tp2", "pp2")),
        ("qwen2", "untied", "tp2_pp2_vpp2"),
        ("qwen2", "tied", "tp2_pp2_vpp2"),
    ],
)
def test_logits_of_a_loaded_checkpoint_equal_those_of_transformers(sources, checkpoints, monkeypatch, family, tied, split):
    folder, parallel = sources(family, tied), SPLITS[split]
    load_converted(monkeypatch, checkpoints(family, tied))
    results = run_ranks(parallel.world_size, lambda rank, world: logits_of_rank(folder, parallel))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = torch.cat([model(sequence[None]).logits[0] for sequence in sequences()])
    torch.testing.assert_close(gather_logits(results, parallel.tensor_model_parallel_size), expected, atol=1e-5, rtol=1e-5)


def test_a_vocabulary_that_is_padded_comes_back_without_its_padding(tmp_path, monkeypatch):
    """1,100 rows: 1,152 in the checkpoint, as Megatron pads for one rank; 1,280 in memory for two."""
    monkeypatch.setattr(reference, "VOCAB", 1100)
    monkeypatch.setattr(moves, "PIECE_BYTES", 100_000)
    model = make_reference(tmp_path / "source")
    to_megatron(tmp_path / "source", tmp_path / "checkpoint", "keep", no_progress)
    stored = FileSystemReader(tmp_path / "checkpoint" / "weights").read_metadata().state_dict_metadata
    assert tuple(stored["output_layer.weight"].size) == (1152, 64)  # type: ignore[union-attr]
    to_hf(tmp_path / "checkpoint", tmp_path / "back", "keep", no_progress)
    assert_same(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "source"))
    load_converted(monkeypatch, tmp_path / "checkpoint")
    results = run_ranks(2, lambda rank, world: logits_of_rank(tmp_path / "source", SPLITS["tp2"]))
    with torch.no_grad():
        expected = torch.cat([model(sequence[None]).logits[0] for sequence in sequences()])
    torch.testing.assert_close(gather_logits(results, 2), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(tensor_model_parallel_size=2, data_parallel_size=2),
        ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    ],
    ids=["tp2_dp2", "pp2_vpp2"],
)
def test_the_model_of_a_run_s_checkpoint_is_read_and_its_optimizer_left(tmp_path, parallel):
    source, folder = write_model(tmp_path / "source"), tmp_path / "iteration_000003"
    for name in ("weights", "hf", "rng"):
        (folder / name).mkdir(parents=True)
    copy_companions(source, folder / "hf")

    def body(rank, world):
        torch.set_num_threads(1)
        model_parallel.initialize(parallel, seed=1)
        policy = Policy(**settings(source, parallel), device=torch.device("cpu"))
        policy.load_hf(source)
        CheckpointWriter().start(policy.modules, policy.optimizer, folder / "weights", asynchronous=False)

    run_ranks(parallel.world_size, body)
    write_manifest(folder, hash_files(folder), {"iteration": 3})
    to_hf(folder, tmp_path / "back", "keep", no_progress)
    assert_same(tensors_of(tmp_path / "back"), tensors_of(source))


def test_the_same_model_gives_the_same_files_with_a_manifest_that_holds(sources, tmp_path):
    for name in ("one", "two"):
        to_megatron(sources("qwen2", "tied"), tmp_path / name, "keep", no_progress)
    one, two = (read_manifest(tmp_path / name) for name in ("one", "two"))
    assert one == two
    assert check_files(tmp_path / "one", one) == []
    assert {"weights/.metadata", "weights/metadata.json", "weights/common.pt", "hf/tokenizer.json"} < one.files.keys()


# Dtypes


def test_bfloat16_stays_bfloat16(source, tmp_path):
    change(source, lambda tensors: tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()}))
    assert to_megatron(source, tmp_path / "converted", "keep", no_progress).rounded == set()
    to_hf(tmp_path / "converted", tmp_path / "back", "keep", no_progress)
    assert_same(tensors_of(tmp_path / "back"), tensors_of(source))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"
    to_hf(tmp_path / "converted", tmp_path / "wide", "float32", no_progress)
    assert_same(tensors_of(tmp_path / "wide"), {name: tensor.float() for name, tensor in tensors_of(source).items()})


def test_rounding_happens_when_asked_for_and_is_told(source, tmp_path, capsys):
    change(source, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64)}))
    command = ["convert", "to-megatron", str(source), "--dtype", "bfloat16", str(tmp_path / "converted")]
    assert main(command) == 0
    printed, progress = capsys.readouterr()
    assert re.search(r"wrote .*: 51 tensors, .* kB in .* s", printed)
    assert re.search(r"converting: (\d+\.\d kB) of \1 in \d+ s\nhashing: ", progress)
    assert "rounded to the dtype asked for: 30 of Megatron's parameters" in printed  # all but the norm of ones
    to_hf(tmp_path / "converted", tmp_path / "back", "keep", no_progress)
    assert_same(tensors_of(tmp_path / "back"), {name: tensor.bfloat16() for name, tensor in tensors_of(source).items()})


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
            "model.norm.weight is stored as float16, which models here do not have; --dtype float32 is exact, "
            "--dtype bfloat16 drops 3 of 10 mantissa bits",
        ),
        (
            lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].double()}),
            "--dtype float32 drops 29 of 52 mantissa bits, --dtype bfloat16 drops 45 of 52",
        ),
        (
            lambda tensors: tensors.update({(name := "model.layers.2.mlp.up_proj.weight"): tensors[name].bfloat16()}),
            "model.layers.2.mlp.up_proj.weight in .* is stored as bfloat16 and model.layers.0.mlp.gate_proj.weight as float32, but in "
            "Megatron they are one tensor; --dtype float32 keeps every bit",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].to(torch.float8_e4m3fn)}),
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


# Bad input


def remove(*names: str):
    def edit(folder: Path) -> None:
        change(folder, lambda tensors: [tensors.pop(name) for name in names])

    return edit


def set_config(**values):
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return edit


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (remove("model.norm.weight", "lm_head.weight"), "lacks lm_head.weight, model.norm.weight$"),
        (
            lambda folder: change(folder, lambda tensors: tensors.update({"model.extra": torch.zeros(1)})),
            "holds model.extra that its config.json does not ask for",
        ),
        (set_config(intermediate_size=128), r"gate_proj.weight in .* has shape \[96, 64\]; config.json asks for \[128, 64\]"),
        (set_config(architectures=["MambaForCausalLM"]), "MambaForCausalLM is not supported; known: .*Qwen3ForCausalLM"),
        (lambda folder: (folder / "model.safetensors").unlink(), "neither model.safetensors.index.json nor model.safetensors"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}})
            ),
            "lacks model-00001-of-00002.safetensors, which its index names",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"model.gone": "model.safetensors", "model.norm.weight": "model.safetensors"}})
            ),
            "do not hold model.gone, though model.safetensors.index.json says so",
        ),
    ],
)
def test_a_bad_hugging_face_folder_is_refused(source, tmp_path, edit, reason):
    edit(source)
    with pytest.raises(UserError, match=reason):
        to_megatron(source, tmp_path / "converted", "keep", no_progress)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def sealed(edit):
    """Damage that the manifest does not know of, because it was written afterwards."""

    def apply(folder: Path) -> None:
        edit(folder)
        write_manifest(folder, hash_files(folder), {})

    return apply


def call_something(folder: Path) -> None:
    """Metadata that would run a command if it were unpickled without a guard."""
    (folder / "weights" / ".metadata").write_bytes(b"cos\nsystem\n(S'touch " + str(folder / "owned").encode() + b"'\ntR.")


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda folder: flip_a_byte(folder / "weights" / "__3_0.distcp"), "is damaged: .*__3_0.distcp has other content"),
        (lambda folder: (folder / "weights" / "__1_0.distcp").unlink(), "is damaged: .*__1_0.distcp is missing"),
        (lambda folder: (folder / "weights" / "more").write_text(""), "is damaged: .*more is not in the manifest"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (
            lambda folder: (folder / "manifest.json").unlink(),
            "a checkpoint without manifest.json, so it was not written to its end",
        ),
        (lambda folder: (folder / "weights" / ".metadata").unlink(), "it has no .metadata"),
        (sealed(lambda folder: (folder / "weights" / ".metadata").write_bytes(b"\x80")), "no readable metadata"),
        (sealed(call_something), "no readable metadata of a checkpoint: it asks for os.system"),
        (lambda folder: set_config(tie_word_embeddings=True)(folder / "hf"), "holds output_layer.weight that its hf/config.json"),
        (
            lambda folder: set_config(num_hidden_layers=5)(folder / "hf"),
            r"has shape \[4, 64\]; hf/config.json asks for \[5, 64\]",
        ),
        (
            lambda folder: set_config(vocab_size=102)(folder / "hf"),
            r"embedding.word_embeddings.weight in .* has shape \[101, 64\]; hf/config.json asks for \[102, 64\]",
        ),
        (lambda folder: set_config(architectures=["Qwen3ForCausalLM"])(folder / "hf"), "lacks .*k_layernorm.weight"),
    ],
)
def test_a_bad_checkpoint_is_refused(checkpoint, tmp_path, edit, reason):
    edit(checkpoint)
    with pytest.raises(UserError, match=reason):
        to_hf(checkpoint, tmp_path / "back", "keep", no_progress)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert not (checkpoint / "owned").exists()


def test_each_direction_says_what_it_was_given_instead(source, checkpoint, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for convert_folder, folder, reason in (
        (to_megatron, checkpoint, "is a Megatron checkpoint already; convert to-hf"),
        (to_hf, source, "is a Hugging Face folder already; convert to-megatron"),
        (to_hf, tmp_path / "run", "is a run's folder; give one of .*run/checkpoints"),
        (to_megatron, tmp_path / "run", "is a run's folder; give .*run/model"),
        (to_hf, tmp_path, "is neither a Hugging Face folder nor a checkpoint"),
        (to_megatron, tmp_path / "nowhere", "there is no folder"),
    ):
        with pytest.raises(UserError, match=reason):
            convert_folder(folder, tmp_path / "target", "keep", no_progress)


def test_an_existing_target_is_left_alone(source, checkpoint, tmp_path):
    (tmp_path / "target").mkdir()
    for convert_folder, folder in ((to_megatron, source), (to_hf, checkpoint)):
        with pytest.raises(UserError, match="exists already"):
            convert_folder(folder, tmp_path / "target", "keep", no_progress)
    assert list((tmp_path / "target").iterdir()) == []


@pytest.mark.parametrize("direction", ["to_megatron", "to_hf"])
def test_a_full_disk_leaves_nothing(source, checkpoint, tmp_path, direction):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        with pytest.raises(UserError, match=r"target.*File too large"):
            getattr(convert, direction)(
                source if direction == "to_megatron" else checkpoint, tmp_path / "target", "keep", no_progress
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name for path in tmp_path.iterdir()} == {"source", "checkpoint"}


def test_an_interruption_leaves_nothing(source, checkpoint, tmp_path):
    def interrupt(what: str, done: int, total: int) -> None:
        if what == "converting" and done:
            raise KeyboardInterrupt

    for convert_folder, folder in ((to_megatron, source), (to_hf, checkpoint)):
        with pytest.raises(KeyboardInterrupt):
            convert_folder(folder, tmp_path / "target", "keep", interrupt)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "checkpoint"}


def test_dst_may_only_be_left_out_of_a_dry_run(source, capsys):
    assert main(["convert", "to-megatron", str(source)]) == 2
    assert "needs DST" in capsys.readouterr().err


def test_a_terminal_gets_a_bar_and_everything_else_lines_with_the_time_left(monkeypatch, capsys):
    with Display() as display:
        display.LINE_EVERY_S = 0.0
        display.update("converting", 0, 4_000_000)
        display.update("converting", 1_000_000, 4_000_000)
    assert "converting: 1.0 MB of 4.0 MB in 0 s, 0 s left\n" in capsys.readouterr().err
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with Display() as display:
        display.update("converting", 1_000_000, 4_000_000)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert re.search(r"converting ━+.* 1\.0/4\.0 MB .* -:--:--", shown)


# Memory


def peak_bytes(run) -> int:
    """What the resident set peaked at during `run` beyond what it was before."""
    fields = lambda: dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())  # noqa: E731
    before = int(fields()["VmRSS"].split()[0])
    Path("/proc/self/clear_refs").write_text("5")
    run()
    return (int(fields()["VmHWM"].split()[0]) - before) * 1024


def test_memory_does_not_grow_with_the_model(tmp_path, monkeypatch):
    """8 and 64 layers of 2.6 MB in float32; the whole second model is 160 MB."""
    monkeypatch.setattr(megatron_checkpoint, "WORKERS", 1)
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
