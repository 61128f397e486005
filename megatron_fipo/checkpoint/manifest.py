"""A checkpoint's `manifest.json`: every file with its size and sha256, and what the checkpoint is of.

It is written last, so a folder that has one was complete at that time; a file that differs from its record was damaged afterwards.
Hashing is work for all ranks: with `shares` of them, number `share` takes every `shares`-th file of the sorted list. No
collectives here; the caller gathers what the ranks return.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from megatron_fipo.errors import UserError, writing

Result = TypeVar("Result")

FORMAT = 1
NAME = "manifest.json"
BLOCK_BYTES = 4 * 2**20
THREADS = 4
"""Per process; sha256 lets other Python threads run while it works."""


@dataclass(frozen=True)
class FileRecord:
    """What a file looked like when it was written."""

    size: int
    """Bytes."""
    sha256: str
    """Hexadecimal."""


@dataclass(frozen=True)
class Manifest:
    files: dict[str, FileRecord]
    """By path relative to the checkpoint, with `/` between its parts; without the manifest itself."""
    info: dict[str, Any]
    """What the checkpoint is of: a run's iteration, parallel layout, library versions; JSON values."""


def hash_files(folder: Path, share: int = 0, shares: int = 1) -> dict[str, FileRecord]:
    """Records of the files below `folder`, or of one share of them; the manifest is left out. Raises OSError."""
    return dict(_map(lambda name: (name, record_file(folder / name)), list_files(folder)[share::shares]))


def list_files(folder: Path) -> list[str]:
    """Sorted paths below `folder`, relative to it, of everything but folders and the manifest."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(name for path in found if (name := path.relative_to(folder).as_posix()) != NAME)


def write_manifest(folder: Path, files: Mapping[str, FileRecord], info: Mapping[str, Any]) -> None:
    """Write the manifest, when the files it names are on the disk, and wait until it is there too. UserError when the disk refuses."""
    content = {
        "format": FORMAT,
        "files": {name: asdict(files[name]) for name in sorted(files)},
        "info": dict(info),
    }
    with writing(folder / NAME):
        _map(lambda name: sync(folder / name), sorted(files))
        (folder / NAME).write_text(json.dumps(content, indent=1) + "\n")
        for path in (folder / NAME, *(path for path in folder.rglob("*") if path.is_dir()), folder):
            sync(path)


def read_manifest(folder: Path) -> Manifest:
    """Raises UserError where the manifest is missing, garbled or of another format."""
    path = folder / NAME
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT:
            raise UserError(
                f"{path} has checkpoint format {content['format']!r} and this version reads {FORMAT}; "
                "load it with the version of Megatron-FIPO that wrote it"
            )
        files = {
            _inside(name): FileRecord(int(record["size"]), str(record["sha256"]))
            for name, record in content["files"].items()
        }
        return Manifest(files, dict(content["info"]))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}), so the folder is not a complete checkpoint"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged and says nothing about its checkpoint ({error!r})") from None


def check_files(folder: Path, manifest: Manifest, share: int = 0, shares: int = 1) -> list[str]:
    """One sentence for each file that is damaged, missing or not in the manifest; or of one share of the files.

    Reads every byte. An empty list from all shares means that the folder is what was written.
    """
    names = sorted({*manifest.files, *list_files(folder)})[share::shares]
    return [
        problem
        for problem in _map(lambda name: check_file(folder / name, manifest.files.get(name)), names)
        if problem
    ]


def check_file(path: Path, written: FileRecord | None) -> str | None:
    """What is wrong with a file for which the manifest has this record, or has none; None where nothing is."""
    if written is None:
        return f"{path} is not in the manifest"
    try:
        size = path.stat().st_size
        if size != written.size:
            return f"{path} has {size:,} bytes instead of {written.size:,}"
        if record_file(path) != written:
            return f"{path} has other content than was written"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return None


def record_file(path: Path) -> FileRecord:
    """Size and hash of one file, read in blocks. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            size += len(block)
    return FileRecord(size, digest.hexdigest())


def _map(function: Callable[[str], Result], names: list[str]) -> list[Result]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, names))


def _inside(name: str) -> str:
    """`name`, if it can only be a file below the checkpoint."""
    parts = PurePosixPath(name).parts
    if not parts or parts[0] == "/" or ".." in parts:
        raise ValueError(f"{name!r} is not a path inside the checkpoint")
    return name


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
