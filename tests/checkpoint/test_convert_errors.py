"""Invalid input of a conversion is a one-sentence error, and no files remain."""

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_fipo.checkpoint.convert import convert
from megatron_fipo.checkpoint.convert.convert import to_hf, to_megatron
from megatron_fipo.checkpoint.manifest import hash_files, list_files, write_manifest
from megatron_fipo.cli.main import main
from megatron_fipo.errors import UserError
from tests.checkpoint.conftest import no_progress


def change(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


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
            "has model.extra, not expected by its config.json",
        ),
        (
            set_config(intermediate_size=128),
            r"gate_proj.weight in .* has shape \[96, 64\]; config.json requires \[128, 64\]",
        ),
        (
            set_config(architectures=["MambaForCausalLM"]),
            "MambaForCausalLM is not supported; known: .*Qwen3ForCausalLM",
        ),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            "neither model.safetensors.index.json nor model.safetensors",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                json.dumps({"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}})
            ),
            "read in two ways: model.safetensors, or model-00001-of-00002.safetensors of "
            "model.safetensors.index.json",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                json.dumps(
                    {
                        "metadata": {},
                        "weight_map": {
                            "model.gone": "model.safetensors",
                            "model.norm.weight": "model.safetensors",
                        },
                    }
                )
            ),
            "lack model.gone, which model.safetensors.index.json lists",
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
    """Damage that the manifest does not reveal, because it is written afterwards."""

    def apply(folder: Path) -> None:
        edit(folder)
        write_manifest(folder, hash_files(folder, list_files(folder)), {})

    return apply


def call_something(folder: Path) -> None:
    """Metadata that runs a command if it is unpickled without restrictions."""
    (folder / "weights" / ".metadata").write_bytes(
        b"cos\nsystem\n(S'touch " + str(folder / "owned").encode() + b"'\ntR."
    )


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (
            lambda folder: flip_a_byte(folder / "weights" / "__3_0.distcp"),
            "is damaged: .*__3_0.distcp has other content",
        ),
        (
            lambda folder: (folder / "weights" / "__1_0.distcp").unlink(),
            "is damaged: .*__1_0.distcp is missing",
        ),
        (
            lambda folder: (folder / "weights" / "more").write_text(""),
            "is damaged: .*more is not in the manifest",
        ),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (
            lambda folder: (folder / "manifest.json").unlink(),
            "a checkpoint without manifest.json, so it is incomplete",
        ),
        (lambda folder: (folder / "weights" / ".metadata").unlink(), "it has no .metadata"),
        (
            sealed(lambda folder: (folder / "weights" / ".metadata").write_bytes(b"\x80")),
            "is not readable as checkpoint metadata",
        ),
        (sealed(call_something), "is not readable as checkpoint metadata: it contains os.system"),
        (
            lambda folder: set_config(tie_word_embeddings=True)(folder / "hf"),
            "has output_layer.weight, not expected by its hf/config.json",
        ),
        (
            lambda folder: set_config(num_hidden_layers=5, layer_types=None)(folder / "hf"),
            r"has shape \[4, 64\]; hf/config.json requires \[5, 64\]",
        ),
        (
            lambda folder: set_config(vocab_size=102)(folder / "hf"),
            r"embedding.word_embeddings.weight in .* has shape \[101, 64\]; "
            r"hf/config.json requires \[102, 64\]",
        ),
        (
            lambda folder: set_config(architectures=["Qwen3ForCausalLM"])(folder / "hf"),
            "lacks .*k_layernorm.weight",
        ),
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
        (to_megatron, checkpoint, "is already a Megatron checkpoint; convert to-hf"),
        (to_hf, source, "is already a Hugging Face folder; convert to-megatron"),
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
        with pytest.raises(UserError, match="already exists"):
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


@pytest.mark.parametrize("direction", ["to-hf", "to-megatron"])
@pytest.mark.parametrize("target", ["x", "x/y", "./x", "../{name}/x", "hf/x", "link/x"])
def test_dst_may_not_be_inside_src(source, checkpoint, tmp_path, monkeypatch, capsys, direction, target):
    folder = checkpoint if direction == "to-hf" else source
    if target.startswith("link"):
        (tmp_path / "link").symlink_to(folder)
        target = "../link/x"
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    assert main(["convert", direction, str(folder), target.format(name=folder.name)]) == 2
    assert f"is inside SRC {folder}; choose a folder outside" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before
