"""Reads a Hugging Face folder of safetensors, one slice at a time."""

import json
from collections.abc import Iterable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_fipo.errors import UserError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's entry in a file's header."""

    file: str
    """Relative to the folder."""
    shape: tuple[int, ...]
    dtype: str
    """Name in the safetensors format, such as `BF16` or `F32`."""


class SafetensorsFolder:
    """The tensors of a folder by name: one `model.safetensors`, or shards with an index.

    The constructor reads the headers of all files. UserError for a missing folder, index or shard, for
    tensors that are in the index but not in the files, and for a file that is not readable safetensors.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"model folder {self.folder} does not exist")
        index = self._read_index()
        files = sorted({*index.values()}) if index is not None else [SINGLE_NAME]
        absent = [file for file in files if not (self.folder / file).is_file()]
        if absent:
            raise UserError(
                f"model folder {self.folder} lacks {listing(absent)}, which its index lists; copy it again"
            )
        found = {name: tensor for file in files for name, tensor in self._read_header(file).items()}
        if index is not None:
            lost = [name for name, file in index.items() if name not in found or found[name].file != file]
            if lost:
                raise UserError(
                    f"the files in {self.folder} lack {listing(lost)}, which {INDEX_NAME} lists; copy them "
                    "again"
                )
            found = {name: found[name] for name in index}
        self.tensors: dict[str, StoredTensor] = found
        """By name, in the order of the index (or of the single file)."""

    def slice(self, name: str) -> Any:
        """A lazy tensor with `get_shape()`. Indexing with slices reads only those elements.

        The file is mapped into memory only while the slice exists, so pages that were read do not accumulate.
        """
        return self._open(self.tensors[name].file).get_slice(name)

    def _read_index(self) -> dict[str, str] | None:
        """The file of each tensor from the index, or None if there is a single file without an index."""
        index = self.folder / INDEX_NAME
        if index.is_file():
            try:
                return dict(json.loads(index.read_text())["weight_map"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"{index} is not a readable index of safetensors: {error!r}") from None
        if not (self.folder / SINGLE_NAME).is_file():
            raise UserError(
                f"model folder {self.folder} has neither {INDEX_NAME} nor {SINGLE_NAME}; only safetensors "
                "are supported"
            )
        return None

    def _read_header(self, file: str) -> dict[str, StoredTensor]:
        with self._open(file) as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
            return {
                name: StoredTensor(file, tuple(tensor.get_shape()), tensor.get_dtype())
                for name, tensor in slices.items()
            }

    def _open(self, file: str) -> Any:
        try:
            return safe_open(self.folder / file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{self.folder / file} is not a readable safetensors file (damaged or truncated?): {error}"
            ) from None


def listing(names: Iterable[str], limit: int = 20) -> str:
    """Names for an error message: all of them, or the first `limit` and the number of the others."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def require_exactly(place: str, found: Set[str], expected: Set[str], config_file: str) -> None:
    """UserError unless the tensor names `found` in `place` are those `expected` by `config_file`."""
    missing, unexpected = expected - found, found - expected
    problems = [f"lacks {listing(missing)}"] if missing else []
    if unexpected:
        problems.append(f"has {listing(unexpected)}, not expected by its {config_file}")
    if problems:
        raise UserError(f"{place} {' and '.join(problems)}")
