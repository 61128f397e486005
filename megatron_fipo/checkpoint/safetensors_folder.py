"""The weights of a Hugging Face folder: which files hold them, and one slice at a time.

transformers reads `model.safetensors` before an index and takes every tensor of the files that it reads; vLLM
reads the files of the index, or all safetensors without one. A folder that they would read differently is
refused here, so all readers of an accepted folder see the same tensors.
"""

import json
import mmap
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_fipo.checkpoint.lost_weights import DOWNLOAD_AGAIN, explain, explain_no_safetensors
from megatron_fipo.errors import UserError, listed
from megatron_fipo.families.fused_experts import compact, is_fused, parts_of
from megatron_fipo.placeholders import refuse_placeholder

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
COMPARED_BYTES = 2**24
"""Bytes of each tensor in memory while two tensors are compared."""

MAX_INDEX_BYTES = 100_000_000
"""Of the index. safetensors has the same limit for the header of a file."""

TORCH_DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "BOOL": "bool"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"},
}
"""torch's names of dtypes, by name in the safetensors format."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's entry in a file's header."""

    file: str
    """Relative to the folder."""
    shape: tuple[int, ...]
    dtype: str
    """Name in the safetensors format, such as `BF16` or `F32`."""
    begin: int
    end: int
    """Its bytes in the file."""


class SafetensorsFolder:
    """The tensors of a folder by name: one `model.safetensors`, or shards with an index.

    A tensor with all experts of a layer appears as the tensors of each expert (`families/fused_experts.py`).

    The constructor reads the headers of all files, without torch. UserError for a missing folder, index or
    shard, for an index that differs from the files, for a tensor in two files or experts in two forms, for other
    safetensors that vLLM would read, and for a file that is not readable safetensors.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"model folder {self.folder} does not exist")
        index = self._read_index()
        files = [SINGLE_NAME] if index is None else sorted({*index.values()})
        self._refuse_other_files(files, index is not None)
        absent = [file for file in files if not (self.folder / file).is_file()]
        if absent:
            why = explain(self.folder, absent)
            raise UserError(
                f"model folder {self.folder} lacks {listing(absent)}, which its index lists"
                + (f", and {why}" if why else "; copy it again")
            )
        found: dict[str, StoredTensor] = {}
        for file in files:
            for name, tensor in self._read_header(file).items():
                if name in found:
                    raise UserError(
                        f"{name} is in two files of {self.folder}, {found[name].file} and {file}; remove it "
                        "from one of them"
                    )
                found[name] = tensor
        if index is not None:
            found = self._in_order_of(index, found)
        self.fused: dict[str, StoredTensor] = {name: found[name] for name in found if is_fused(name)}
        """The tensors that are stored with all experts of a layer, by name."""
        self.tensors: dict[str, StoredTensor] = self._separate_experts(found)
        """By name, in the order of the index (or of the single file)."""

    def slice(self, name: str) -> Any:
        """A lazy tensor with `get_shape()`. Indexing reads only those elements, as a copy.

        Its part of the file is mapped into memory only while it is read, so pages that were read do not accumulate. The
        file's header is not parsed again, which would take a millisecond for each of the thousands of tensors of experts.
        """
        return _Slice(self.folder, self.tensors[name])

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors have the same shape, dtype and bits. Reads both, in parts, without torch."""
        first, second = self.tensors[one], self.tensors[other]
        if (first.shape, first.dtype) != (second.shape, second.dtype):
            return False
        return all(a == b for a, b in zip(self._bytes(first), self._bytes(second), strict=True))

    def _bytes(self, tensor: StoredTensor) -> Iterator[bytes]:
        path = self.folder / tensor.file
        try:
            with path.open("rb") as file:
                file.seek(tensor.begin)
                for start in range(tensor.begin, tensor.end, COMPARED_BYTES):
                    yield file.read(min(COMPARED_BYTES, tensor.end - start))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; copy it again") from None

    def _read_index(self) -> dict[str, str] | None:
        """The file of each tensor from the index, or None if there is a single file without an index."""
        path = self.folder / INDEX_NAME
        has_single = (self.folder / SINGLE_NAME).is_file()
        if not path.is_file():
            if not has_single:
                why = explain(self.folder, (INDEX_NAME, SINGLE_NAME)) or explain_no_safetensors(self.folder)
                why = why or f"has no weights; {DOWNLOAD_AGAIN}"
                raise UserError(
                    f"model folder {self.folder} has neither {INDEX_NAME} nor {SINGLE_NAME}: it {why} (only "
                    "safetensors are supported)"
                )
            return None
        index = _parse_index(path)
        others = {*index.values()} - {SINGLE_NAME}
        if has_single and others:
            raise UserError(
                f"model folder {self.folder} can be read in two ways: {SINGLE_NAME}, or {listing(others)} of "
                f"{INDEX_NAME}; remove the ones that are not the model"
            )
        return index

    def _refuse_other_files(self, files: list[str], indexed: bool) -> None:
        """UserError for safetensors besides `files` that another reader takes for the model."""
        others = sorted(path.name for path in self.folder.glob("*.safetensors") if path.name not in files)
        # vLLM prefers these to all others, wherever they are, and transformers files named `shard-...`.
        preferred = [
            str(path.relative_to(self.folder)) for path in self.folder.rglob("consolidated*.safetensors")
        ]
        preferred += [name for name in others if name.startswith("shard-")]
        read = preferred if indexed else sorted({*preferred, *others})
        if read:
            raise UserError(
                f"model folder {self.folder} can be read in two ways: {listing(files, 3)}, or also {listing(read)}; "
                "move the ones that are not the model out of the folder"
            )

    def _in_order_of(self, index: dict[str, str], found: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        """`found` in the order of the index. UserError unless both have the same tensors in the same files."""
        lost = [name for name, file in index.items() if name not in found or found[name].file != file]
        if lost:
            raise UserError(
                f"the files in {self.folder} lack {listing(lost)}, which {INDEX_NAME} lists; copy them again"
            )
        unlisted = found.keys() - index.keys()
        if unlisted:
            files = {found[name].file for name in unlisted}
            raise UserError(
                f"{INDEX_NAME} in {self.folder} does not list {listing(unlisted)}, which {listing(files, 3)} has; "
                "copy the folder again"
            )
        return {name: found[name] for name in index}

    def _separate_experts(self, found: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        """`found` with the tensors of each expert in the place of those with all experts of a layer.

        UserError if a tensor is in both forms.
        """
        separated = {}
        for name, tensor in found.items():
            parts = list(parts_of(name, tensor.shape))
            size = (tensor.end - tensor.begin) // max(len(parts), 1)
            if both := [part.name for part in parts if part.name in found]:
                raise UserError(
                    f"{self.folder} has experts in two forms, {name} and {listing(both)}; remove the one that is not the "
                    "model"
                )
            for index, part in enumerate(parts):
                begin = tensor.begin + index * size
                shape = (part.rows, tensor.shape[2])
                separated[part.name] = StoredTensor(tensor.file, shape, tensor.dtype, begin, begin + size)
            if not parts:
                separated[name] = tensor
        return separated

    def _read_header(self, file: str) -> dict[str, StoredTensor]:
        opened = self._open(file, "numpy")  # it checks the header against the file
        with opened, (self.folder / file).open("rb") as content:
            length = int.from_bytes(content.read(8), "little")
            header = json.loads(content.read(length))
            tensors = {}
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                entry = header[name]
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                tensors[name] = StoredTensor(file, tuple(entry["shape"]), entry["dtype"], begin, end)
            return tensors

    def _open(self, file: str, framework: str) -> Any:
        try:
            return safe_open(self.folder / file, framework=framework)
        except (OSError, SafetensorError) as error:
            refuse_placeholder(self.folder / file)
            raise UserError(
                f"{self.folder / file} is not a readable safetensors file (damaged or truncated?): {error}"
            ) from None


class _Slice:
    """A lazy tensor."""

    def __init__(self, folder: Path, stored: StoredTensor) -> None:
        self.path, self.stored = folder / stored.file, stored

    def get_shape(self) -> list[int]:
        return list(self.stored.shape)

    def __getitem__(self, index: Any) -> Any:
        import torch

        stored, dtype = self.stored, getattr(torch, TORCH_DTYPES[self.stored.dtype])
        count = stored.end - stored.begin
        if not count:
            return torch.empty(stored.shape, dtype=dtype)[index]
        first = stored.begin - stored.begin % mmap.ALLOCATIONGRANULARITY
        try:
            with self.path.open("rb") as file:
                # Writable in this process only: torch warns about tensors of memory that is not.
                mapped = mmap.mmap(file.fileno(), stored.end - first, access=mmap.ACCESS_COPY, offset=first)
        except (OSError, ValueError) as error:  # ValueError: the file has become shorter
            raise UserError(f"cannot read {self.path}: {error}; copy it again") from None
        values = torch.frombuffer(mapped, dtype=torch.uint8, offset=stored.begin - first, count=count)
        return values.view(dtype).view(stored.shape)[index].clone()


def _parse_index(path: Path) -> dict[str, str]:
    """The file of each tensor. UserError unless it is an index that transformers and vLLM can read."""
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError(f"it has more than {MAX_INDEX_BYTES:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        files = content["weight_map"]
        if not (isinstance(content["metadata"], dict) and isinstance(files, dict) and files):
            raise TypeError("weight_map and metadata have to be objects, the first not empty")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        refuse_placeholder(path)
        raise UserError(f"{path} is not a readable index of safetensors ({error!r}); copy it again") from None
    for name, file in files.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(
                f"{path} has {name} in {file!r}, which is not a safetensors file of the same folder; move the "
                "file there and correct the index"
            )
    return files


def listing(names: Iterable[str], limit: int = 20) -> str:
    """Names for an error message: all of them, or the first `limit` and the number of the others."""
    return listed(compact(names), limit)


def require_exactly(place: str, found: Set[str], expected: Set[str], config_file: str) -> None:
    """UserError unless the tensor names `found` in `place` are those `expected` by `config_file`."""
    missing, unexpected = expected - found, found - expected
    problems = [f"lacks {listing(missing, 5)}"] if missing else []
    if unexpected:
        problems.append(f"has {listing(unexpected, 5)}, not expected by its {config_file}")
    if problems:
        raise UserError(f"{place} {' and '.join(problems)}")
