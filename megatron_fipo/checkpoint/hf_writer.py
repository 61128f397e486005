"""Writing a Hugging Face folder: sharded safetensors that come one tensor at a time, and the files that belong to them."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from megatron_fipo.checkpoint.safetensors_folder import INDEX_NAME, SINGLE_NAME
from megatron_fipo.errors import UserError
from megatron_fipo.model.families import read_hf_config

SHARD_BYTES = 4_000_000_000
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates",
    "*.model",
    "*.tiktoken",
    "*.py",
    "LICENSE*",
)
"""What travels with the weights, as glob patterns."""


class HFWriter:
    """Collects tensors into shards and puts the complete folder in place at the end.

    `shapes` names all tensors that will be added, in order, so that shard names are known from the start. UserError from any
    method leaves nothing on disk.
    """

    def __init__(self, source: Path, target: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype) -> None:
        self.target, self.dtype = target.absolute(), dtype
        self.partial = self.target.with_name(f".{target.name}.{os.getpid()}.incomplete")
        self.total_bytes = sum(prod(shape) for shape in shapes.values()) * dtype.itemsize
        self.files = assign_shards({name: prod(shape) * dtype.itemsize for name, shape in shapes.items()}, SHARD_BYTES)
        self.waiting = {file: list(self.files.values()).count(file) for file in set(self.files.values())}
        self.pending: dict[str, torch.Tensor] = {}
        if self.target.exists():
            raise UserError(f"{target} exists already; give another folder or remove it")
        config = read_hf_config(source)
        try:
            self.partial.mkdir(parents=True)
            self._copy_companions(source, config)
        except OSError as error:
            self._fail(error)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take the next tensor; a shard is written when its last tensor has come."""
        file = self.files[name]
        self.pending[name] = tensor.to(self.dtype).contiguous()
        self.waiting[file] -= 1
        if self.waiting[file]:
            return
        try:
            save_file(self.pending, self.partial / file, metadata={"format": "pt"})
            # safetensors makes files that only their owner may read, whatever the user's umask says.
            shutil.copymode(self.partial / "config.json", self.partial / file)
        except (OSError, SafetensorError) as error:
            self._fail(error)
        self.pending = {}

    def finish(self) -> None:
        """Write the index, if there are several shards, and give the folder its name."""
        try:
            if len(self.waiting) > 1:
                index = {"metadata": {"total_size": self.total_bytes}, "weight_map": self.files}
                (self.partial / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
            self.partial.rename(self.target)
        except OSError as error:
            self._fail(error)

    def _copy_companions(self, source: Path, config: dict) -> None:
        for path in sorted({path for pattern in COMPANIONS for path in source.glob(pattern)}):
            if path.is_dir():
                shutil.copytree(path, self.partial / path.name)
            else:
                shutil.copyfile(path, self.partial / path.name)
        # transformers reads weights in the dtype that config.json names: `dtype`, or `torch_dtype` in older files.
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        stored = str(self.dtype).removeprefix("torch.")
        if config.get(key) != stored:
            (self.partial / "config.json").write_text(json.dumps({**config, key: stored}, indent=2) + "\n")

    def _fail(self, error: Exception) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
        self.pending = {}
        raise UserError(f"the model could not be written to {self.target}: {error}") from None


def assign_shards(sizes: Mapping[str, int], limit: int) -> dict[str, str]:
    """The file of each tensor (sizes in bytes), filled in order up to `limit`; a larger tensor has a file of its own."""
    numbers: dict[str, int] = {}
    number, filled = 0, 0
    for name, size in sizes.items():
        if filled and filled + size > limit:
            number, filled = number + 1, 0
        numbers[name] = number
        filled += size
    if number == 0:
        return dict.fromkeys(sizes, SINGLE_NAME)
    return {name: f"model-{index + 1:05d}-of-{number + 1:05d}.safetensors" for name, index in numbers.items()}
