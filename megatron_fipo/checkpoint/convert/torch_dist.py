"""Reads and writes weights in Megatron-Core's distributed format (`torch_dist`), piece by piece.

Needs no GPU, no process group and no model. The format is torch.distributed.checkpoint's: `.metadata` lists
all tensors and the files of their pieces. `stacking.py` has the names.
"""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

import io
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_fipo.checkpoint.convert.stacking import Place
from megatron_fipo.checkpoint.plain_pickles import read_index
from megatron_fipo.errors import UserError

WEIGHTS = "weights"
"""The folder of these files in a checkpoint."""
FILE_BYTES = 2_000_000_000
WORKERS = min(4, os.cpu_count() or 1)
"""Threads that convert. Each has one piece in memory."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class TensorPiece:
    """A range of rows of a weight, as a rectangular part of a stored tensor."""

    place: Place
    shape: tuple[int, ...]
    """Of the complete weight, as it is stored."""
    first: int
    """Its first row."""
    rows: int

    @property
    def full(self) -> tuple[int, ...]:
        """Shape of the stored tensor."""
        return (*self.place.lengths, *self.shape)

    @property
    def offset(self) -> tuple[int, ...]:
        """First index in each dimension of the stored tensor."""
        return (*self.place.index, self.first, *[0] * len(self.shape[1:]))

    @property
    def size(self) -> tuple[int, ...]:
        """Length in each dimension of the stored tensor."""
        return (*[1] * len(self.place.index), self.rows, *self.shape[1:])


def in_parallel(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """The results in order, from `WORKERS` threads.

    The first error cancels the items not yet started and is raised.
    """
    with ThreadPoolExecutor(WORKERS) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# --- writing ------------------------------------------------------------------------------------------------


class _LazyPlanner(DefaultSavePlanner):
    """Resolves each tensor only when it is written."""

    def __init__(self, resolve: Callable[[MetadataIndex], torch.Tensor | io.BytesIO]) -> None:
        super().__init__()
        self.resolve = resolve

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        return self.resolve(write_item.index)


class _Writer(FileSystemWriter):
    def storage_meta(self) -> None:
        """No time or path in the metadata: the same weights give the same files."""


def write_weights(
    folder: Path,
    pieces: Sequence[tuple[TensorPiece, torch.dtype]],
    extra_states: Sequence[str],
    content: Mapping[str, Any],
    read: Callable[[TensorPiece], torch.Tensor],
) -> None:
    """Write a checkpoint folder that `dist_checkpointing.load` reads for any layout.

    `read` is called once per piece. `content` is what `dist_checkpointing.load_content_metadata` will return.
    At most `WORKERS` pieces are in memory at a time. A file has one tensor, or 2 GB of one. Raises OSError.
    """
    by_index = {MetadataIndex(piece.place.key, piece.offset): piece for piece, _ in pieces}
    plans = [SavePlan([_write_item(piece, dtype) for piece, dtype in group]) for group in _by_file(pieces)]
    plans.append(SavePlan([WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in extra_states]))
    plans, metadata = create_default_global_save_plan(plans)
    writer = _Writer(folder)
    writer.set_up_storage_writer(True)
    plans = writer.prepare_global_plan([writer.prepare_local_plan(plan) for plan in plans])

    def resolve(index: MetadataIndex) -> torch.Tensor | io.BytesIO:
        if index.offset is None:
            return _empty_extra_state()
        piece = by_index[index]
        return read(piece).reshape(piece.size)

    planner = _LazyPlanner(resolve)
    try:
        results = in_parallel(lambda plan: writer.write_data(plan, planner).wait(), plans)
    except RuntimeError as error:
        # torch.save reports a disk error as a RuntimeError caused by it.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    writer.finish(metadata, results)
    # Additional files for Megatron-Core: the state common to all ranks, and last the name of the format.
    torch.save({"content_metadata": dict(content)}, folder / "common.pt")
    save_config(CheckpointingConfig("torch_dist"), str(folder))


def _write_item(piece: TensorPiece, dtype: torch.dtype) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.size))
    data = TensorWriteData(chunk, TensorProperties(dtype), torch.Size(piece.full))
    return WriteItem(MetadataIndex(piece.place.key, piece.offset), WriteItemType.SHARD, tensor_data=data)


def _by_file(
    pieces: Sequence[tuple[TensorPiece, torch.dtype]],
) -> Iterator[list[tuple[TensorPiece, torch.dtype]]]:
    """One tensor per file: torch keeps the last piece of each tensor in memory until its file is complete."""
    by_key: dict[str, list[tuple[TensorPiece, torch.dtype]]] = {}
    for piece, dtype in pieces:
        by_key.setdefault(piece.place.key, []).append((piece, dtype))
    for of_key in by_key.values():
        group: list[tuple[TensorPiece, torch.dtype]] = []
        filled = 0
        for piece, dtype in of_key:
            size = prod(piece.size) * dtype.itemsize
            if group and filled + size > FILE_BYTES:
                yield group
                group, filled = [], 0
            group.append((piece, dtype))
            filled += size
        yield group


def _empty_extra_state() -> io.BytesIO:
    content = io.BytesIO()
    torch.save([None], content)
    return content


# --- reading ------------------------------------------------------------------------------------------------


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_index(Path(self.path))


class _IntoTensor(DefaultLoadPlanner):
    """Reads into one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return self.target[
            tuple(slice(o, o + n) for o, n in zip(read_item.dest_offsets, read_item.lengths, strict=True))
        ]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass


class WeightsReader:
    """The tensors of a checkpoint's weights folder. Thread-safe.

    UserError if its metadata is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = _Reader(folder)
        try:
            metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(metadata, True)
            stored = metadata.state_dict_metadata
        except FileNotFoundError:
            raise UserError(
                f"{folder} is not a distributed checkpoint of Megatron-Core: it has no .metadata"
            ) from None
        except (
            OSError,
            pickle.UnpicklingError,
            EOFError,
            AttributeError,
            ImportError,
            ValueError,
            TypeError,
        ) as error:
            raise UserError(
                f"{folder / '.metadata'} is not readable as checkpoint metadata: {error}"
            ) from None
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: entry for key, entry in stored.items() if isinstance(entry, TensorStorageMetadata)
        }
        """By key, without objects that are not tensors."""
        self._chunks: dict[str, dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}

    def chunks(self, place: Place) -> Sequence[ChunkStorageMetadata]:
        """The stored pieces of one weight of a stacked tensor.

        Those of a key are sorted by weight once: a tensor of experts has thousands of weights.
        """
        if place.key not in self._chunks:
            by_index: dict[tuple[int, ...], list[ChunkStorageMetadata]] = {}
            for chunk in self.tensors[place.key].chunks:
                by_index.setdefault(tuple(chunk.offsets[: len(place.index)]), []).append(chunk)
            self._chunks[place.key] = by_index
        return self._chunks[place.key].get(place.index, [])

    def read(self, piece: TensorPiece) -> torch.Tensor:
        """The values [size] of a piece, from the stored pieces that overlap it.

        These are read completely, one at a time.
        """
        key, stored = piece.place.key, self.tensors[piece.place.key]
        items = create_read_items_for_chunk_list(
            key,
            replace(stored, chunks=list(self.chunks(piece.place))),
            [ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.size))],
        )
        if sum(prod(item.lengths) for item in items) != prod(piece.size):
            raise UserError(
                f"{self.folder} does not have all of {key} (needed: {piece.size} at {piece.offset})"
            )
        target = torch.empty(piece.size, dtype=stored.properties.dtype)
        self._reader.read_data(LoadPlan(items), _IntoTensor(target)).wait()
        return target
