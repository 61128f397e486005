"""Reads the pickles of Megatron-Core's and torch's checkpoints as data: a checkpoint that others may write runs no code.

torch unpickles the index (`.metadata`), and objects in the data files, without limits. Within `plain_pickles` the index may
contain only the classes of an index, and everything else only what `torch.load(weights_only=True)` accepts.
"""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

INDEX_FILE = ".metadata"
"""torch's name."""
_FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_OPPOSITE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_CLASSES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        *(
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
        ),
        *("TensorProperties", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.planner": {
        "SavePlan",
        "WriteItem",
        "WriteItemType",
        "TensorWriteData",
        "BytesIOWriteData",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()) or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it contains {module}.{name}")


def read_index(folder: Path) -> Metadata:
    """The index of a folder of weights.

    Raises `pickle.UnpicklingError` if it contains other objects than an index has, or a file outside the folder, and any
    error that a damaged pickle raises.
    """
    with open(folder / INDEX_FILE, "rb") as file:
        index = _IndexUnpickler(file).load()
    for stored in (index.storage_data or {}).values():
        if PurePath(stored.relative_path).name != stored.relative_path:
            raise pickle.UnpicklingError(f"it names {stored.relative_path!r}, which is not a file beside it")
    return index


@contextmanager
def plain_pickles() -> Iterator[None]:
    """All checkpoint readers of this process read as the module docstring says. Errors as `read_index`."""

    def read(reader: FileSystemReader, *args: Any, **keywords: Any) -> Metadata:
        index = read_index(Path(reader.path))
        index.storage_meta = index.storage_meta or StorageMeta()
        index.storage_meta.load_id = reader.load_id
        return index

    original = FileSystemReader.read_metadata
    before = {name: os.environ.pop(name, None) for name in (_FORCED, _OPPOSITE)}
    os.environ[_FORCED] = "1"
    FileSystemReader.read_metadata = read  # type: ignore
    try:
        yield
    finally:
        FileSystemReader.read_metadata = original  # type: ignore
        del os.environ[_FORCED]
        os.environ |= {name: value for name, value in before.items() if value is not None}
