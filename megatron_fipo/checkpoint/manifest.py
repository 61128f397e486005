"""A checkpoint's `manifest.json`: size and sha256 of every file, and information about the checkpoint.

It is written last, so a folder with a manifest was complete at that time. A file that differs from its record
was damaged afterwards. All ranks share the hashing: share `share` of `shares` is every `shares`-th file of
the sorted list. No collectives here; the caller gathers the ranks' results.
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
"""Per process. sha256 releases the GIL, so threads run in parallel."""


@dataclass(frozen=True)
class FileRecord:
    """Size and hash of a file when it was written."""

    size: int
    """Bytes."""
    sha256: str
    """Hexadecimal."""


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest."""

    files: dict[str, FileRecord]
    """By path relative to the checkpoint, with `/` as separator; the manifest itself is not included."""
    info: dict[str, Any]
    """A run's iteration, parallel layout, library versions, as JSON values."""


def hash_files(folder: Path, share: int = 0, shares: int = 1) -> dict[str, FileRecord]:
    """Records of the files below `folder`, or of one share of them, without the manifest. Raises OSError."""
    return dict(_map(lambda name: (name, record_file(folder / name)), list_files(folder)[share::shares]))


def list_files(folder: Path) -> list[str]:
    """Sorted paths below `folder`, relative to it, of all files except the manifest.

    Symbolic links are files.
    """
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(name for path in found if (name := path.relative_to(folder).as_posix()) != NAME)


def write_manifest(folder: Path, files: Mapping[str, FileRecord], info: Mapping[str, Any]) -> None:
    """Sync the named files to disk, then write and sync the manifest. UserError if the disk refuses."""
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
    """Raises UserError if the manifest is missing, malformed or has another format version."""
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
        raise UserError(f"{path} is damaged and does not describe its checkpoint ({error!r})") from None


def check_files(folder: Path, manifest: Manifest, share: int = 0, shares: int = 1) -> list[str]:
    """One sentence per file (of all, or of one share) that is damaged, missing or not in the manifest.

    Reads every byte. If all shares return an empty list, the folder is exactly as it was written.
    """
    names = sorted({*manifest.files, *list_files(folder)})[share::shares]
    return [
        problem
        for problem in _map(lambda name: check_file(folder / name, manifest.files.get(name)), names)
        if problem
    ]


def check_file(path: Path, written: FileRecord | None) -> str | None:
    """The problem of a file with this record in the manifest (None: no record), or None if it is intact."""
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
    """`name`; ValueError unless it is a path inside the checkpoint."""
    parts = PurePosixPath(name).parts
    if not parts or parts[0] == "/" or ".." in parts:
        raise ValueError(f"{name!r} is not a path inside the checkpoint")
    return name


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
