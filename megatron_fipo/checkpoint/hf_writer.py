"""Writes a Hugging Face folder: sharded safetensors, one tensor at a time, and their companion files."""

import json
import os
import secrets
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from megatron_fipo.checkpoint.companions import copy_companions
from megatron_fipo.checkpoint.model_folder import describe_export
from megatron_fipo.checkpoint.safetensors_folder import INDEX_NAME, SINGLE_NAME
from megatron_fipo.errors import UserError
from megatron_fipo.families.registry import read_hf_config

SHARD_BYTES = 4_000_000_000
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
"""Names in the safetensors format."""


@dataclass(frozen=True)
class _Location:
    """The location of a tensor in the files."""

    file: str
    offset: int
    """Byte offset of its first byte in the file."""
    dtype: torch.dtype


class HFWriter:
    """Writes tensors to their location in the files as they are added, and renames the folder at the end.

    `shapes` names all tensors that will be added. So the files' headers are written first and no tensor is
    kept in memory. Tensors may be added in any order and from several threads. `dtype` is one dtype for all,
    or one per tensor. After a UserError from any method no files remain on disk.
    """

    def __init__(
        self,
        source: Path,
        target: Path,
        shapes: Mapping[str, Sequence[int]],
        dtype: torch.dtype | Mapping[str, torch.dtype],
    ) -> None:
        self.target = target.absolute()
        self.partial = hidden_name(self.target)
        dtypes = dict.fromkeys(shapes, dtype) if isinstance(dtype, torch.dtype) else dtype
        sizes = {name: prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
        self.total_bytes = sum(sizes.values())
        self.files = assign_shards(sizes, SHARD_BYTES)
        self._missing = dict(sizes)
        self._lock = threading.Lock()
        if self.target.exists():
            raise UserError(f"{target} already exists; give another folder or remove it")
        config = read_hf_config(source)
        try:
            self.partial.mkdir(parents=True)
            copy_companions(source, self.partial)
            widest_first = sorted(set(dtypes.values()), key=lambda kind: (-kind.itemsize, str(kind)))
            written = describe_export(
                config, shapes, [str(kind).removeprefix("torch.") for kind in widest_first]
            )
            if written != config:
                (self.partial / "config.json").write_text(json.dumps(written, indent=2) + "\n")
            self._locations = self._write_headers(
                {name: (dtypes[name], tuple(shape)) for name, shape in shapes.items()}
            )
        except OSError as error:
            self._fail(error)

    def add(self, name: str, tensor: torch.Tensor, first_row: int = 0) -> None:
        """Write a tensor, or the rows of it from `first_row` on. UserError if the disk refuses."""
        location = self._locations[name]
        values = tensor.to(location.dtype).contiguous()
        row_bytes = prod(values.shape[1:]) * values.itemsize
        content = values.flatten().view(torch.uint8).numpy().data
        try:
            _write_at(self.partial / location.file, content, location.offset + first_row * row_bytes)
        except OSError as error:
            self._fail(error)
        with self._lock:
            self._missing[name] -= len(content)

    def finish(self) -> None:
        """Write the index, if there are several shards, and rename the folder.

        ValueError if a tensor was not added.
        """
        incomplete = [name for name, missing in self._missing.items() if missing]
        if incomplete:
            self.discard()
            raise ValueError(
                f"{incomplete[0]} was not added completely, nor were {len(incomplete) - 1} others"
            )
        try:
            if len(set(self.files.values())) > 1:
                index = {"metadata": {"total_size": self.total_bytes}, "weight_map": self.files}
                (self.partial / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
            self.partial.rename(self.target)
        except OSError as error:
            self._fail(error)

    def discard(self) -> None:
        """Remove the files written so far."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def _write_headers(
        self, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    ) -> dict[str, _Location]:
        """Write each file's header (length in 8 bytes, then JSON) and allocate space for its tensors."""
        locations: dict[str, _Location] = {}
        for file in dict.fromkeys(self.files.values()):
            # Wide dtypes first, so that every tensor is aligned to its element size.
            names = sorted(
                (name for name in tensors if self.files[name] == file),
                key=lambda name: -tensors[name][0].itemsize,
            )
            entries, starts, filled = {}, {}, 0
            for name in names:
                dtype, shape = tensors[name]
                starts[name], filled = filled, filled + prod(shape) * dtype.itemsize
                entries[name] = {
                    "dtype": DTYPE_NAMES[dtype],
                    "shape": list(shape),
                    "data_offsets": [starts[name], filled],
                }
            text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            path, begin = self.partial / file, 8 + len(text)
            path.write_bytes(len(text).to_bytes(8, "little") + text)
            os.truncate(path, begin + filled)
            locations.update(
                (name, _Location(file, begin + starts[name], tensors[name][0])) for name in names
            )
        return locations

    def _fail(self, error: Exception) -> None:
        self.discard()
        raise UserError(f"the model could not be written to {self.target}: {error}") from None


def hidden_name(target: Path) -> Path:
    """The path of an incomplete folder: next to the target, so that a rename completes it atomically."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.incomplete")


def assign_shards(sizes: Mapping[str, int], limit: int) -> dict[str, str]:
    """The file of each tensor (sizes in bytes), filled in order up to `limit`.

    A larger tensor gets a separate file.
    """
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


def _write_at(path: Path, content: memoryview, offset: int) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        while content:
            written = os.pwrite(descriptor, content, offset)
            content, offset = content[written:], offset + written
    finally:
        os.close(descriptor)
