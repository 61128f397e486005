"""Model folders with faults: a tiny Qwen2 with a tokenizer, and ways to change its files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megatron_fipo.checkpoint.safetensors_folder import INDEX_NAME, SINGLE_NAME
from tests.tiny_qwen2 import save_qwen2, save_tokenizer

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
Edit = Callable[[Path], None]


def save_model(folder: Path, tied: bool = False, sharded: bool = False, dtype: str = "float32") -> Path:
    """A model of 12k parameters in `folder`, in one file or two."""
    save_qwen2(
        folder,
        seed=3,
        hidden_size=16,
        intermediate_size=24,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    save_tokenizer(folder)
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in stored(folder).items()}
    write(folder, tensors)
    set_json("config.json", dtype=dtype)(folder)
    if sharded:
        shard(folder)
    return folder


def stored(folder: Path, file: str = SINGLE_NAME) -> dict[str, torch.Tensor]:
    return load_file(folder / file)


def write(folder: Path, tensors: dict[str, torch.Tensor], file: str = SINGLE_NAME) -> None:
    # A copy: safetensors refuses tensors that share memory.
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / file, {"format": "pt"})


def shard(folder: Path) -> None:
    """Two files with an index instead of one."""
    tensors = stored(folder)
    names = list(tensors)
    files = {name: SHARDS[index > len(names) // 2] for index, name in enumerate(names)}
    for file in SHARDS:
        write(folder, {name: tensors[name] for name in names if files[name] == file}, file)
    set_index(folder, files)
    (folder / SINGLE_NAME).unlink()


def set_index(folder: Path, files: dict[str, Any]) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))


def index_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / INDEX_NAME).read_text())["weight_map"]


def weight_files(folder: Path) -> list[str]:
    """The safetensors at the top of the folder."""
    return sorted(path.name for path in folder.glob("*.safetensors"))


def in_tensors(change: Callable[[dict[str, torch.Tensor]], object], file: str = SINGLE_NAME) -> Edit:
    """An edit of the tensors of one file."""

    def edit(folder: Path) -> None:
        tensors = stored(folder, file)
        change(tensors)
        write(folder, tensors, file)

    return edit


def put(name: str, make: Callable[[dict[str, torch.Tensor]], torch.Tensor], file: str = SINGLE_NAME) -> Edit:
    """An edit that adds or replaces a tensor."""
    return in_tensors(lambda tensors: tensors.update({name: make(tensors)}), file)


def drop(*names: str) -> Edit:
    return in_tensors(lambda tensors: [tensors.pop(name) for name in names])


def spoil(name: str, value: float) -> Edit:
    """An edit that sets one value of a tensor, the last one."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[-1] = value

    return in_tensors(change)


def set_json(file: str, **values: Any) -> Edit:
    """An edit that sets keys of a JSON file. `...` removes a key."""

    def edit(folder: Path) -> None:
        path = folder / file
        content = {**(json.loads(path.read_text()) if path.exists() else {}), **values}
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return edit


def set_config(**values: Any) -> Edit:
    return set_json("config.json", **values)


def set_text(file: str, text: str = "{}") -> Edit:
    def edit(folder: Path) -> None:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text)

    return edit


def other_weights(file: str) -> Edit:
    """An edit that writes the same tensors with other values into a file."""

    def edit(folder: Path) -> None:
        tensors = {
            name: tensor for path in weight_files(folder) for name, tensor in stored(folder, path).items()
        }
        (folder / file).parent.mkdir(exist_ok=True)
        write(folder, {name: tensor + 1 for name, tensor in tensors.items()}, file)

    return edit


def stale_index(folder: Path) -> None:
    """Beside model.safetensors, an index and a shard of other weights."""
    other_weights(SHARDS[0])(folder)
    set_index(folder, dict.fromkeys(stored(folder), SHARDS[0]))


def steps(*edits: Edit) -> Edit:
    def edit(folder: Path) -> None:
        for step in edits:
            step(folder)

    return edit
