"""A checkpoint's `manifest.json`: size and sha256 of every file, and information about the checkpoint.

It is written last, so a folder with a manifest was complete at that time. A file that differs from its record
was damaged afterwards. All ranks share the work, by names: each hashes the files that it wrote, and on loading
checks its share of the manifest. No rank lists a folder, because nodes may see a new file of a network file
system at different times. No collectives here; the caller gathers the ranks' results.
"""

import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from megatron_fipo import progress
from megatron_fipo.errors import UserError, writing

Result = TypeVar("Result")

FORMAT = 1
NAME = "manifest.json"
BLOCK_BYTES = 4 * 2**20
NODE_CACHE_S = 60.0
"""How long a node may see an old state of a folder on a network file system (`acdirmax` of NFS)."""
POLL_S = 1.0
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


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Records of the named files below `folder`. Raises OSError, also if one is not there."""
    return dict(_map(lambda name: (name, record_file(folder / name)), names))


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
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is damaged and does not describe its checkpoint ({error!r})") from None


def check_files(folder: Path, files: Mapping[str, FileRecord], within_s: float = 0.0) -> list[str]:
    """One sentence per recorded file that is damaged or missing. Reads every byte.

    A file that is not there is looked for again, for `within_s` seconds at most. If this and `wrong_names` return
    nothing for a manifest, the folder is exactly as it was written.
    """
    lasting(lambda: [name for name in files if not os.path.exists(folder / name)], within_s)
    found = _map(lambda name: check_file(folder / name, files[name]), sorted(files))
    return [problem for problem in found if problem]


def wrong_names(folder: Path, manifest: Manifest) -> list[str]:
    """One sentence per file that is missing or not in the manifest."""
    found = set(list_files(folder))
    absent = [name for name in manifest.files if not os.path.exists(folder / name)]
    missing = [f"{folder / name} is missing" for name in sorted(absent)]
    return missing + [
        f"{folder / name} is not in the manifest" for name in sorted(found - manifest.files.keys())
    ]


def share_of(files: Mapping[str, FileRecord], share: int, shares: int) -> dict[str, FileRecord]:
    """Every `shares`-th file in order of the names, from number `share` on."""
    return {name: files[name] for name in sorted(files)[share::shares]}


def lasting(find: Callable[[], list[str]], within_s: float) -> list[str]:
    """What `find` returns when that is nothing, or after `within_s` seconds. It is called repeatedly."""
    deadline = time.monotonic() + within_s
    while (found := find()) and time.monotonic() < deadline:
        time.sleep(min(POLL_S, within_s))
    return found


def unsettled_s(folder: Path) -> float:
    """Seconds for which a node may still have an old view of a checkpoint, which was complete when its manifest was written."""
    written = (folder / NAME).stat().st_mtime
    return min(max(written + NODE_CACHE_S - time.time(), 0.0), NODE_CACHE_S)


def check_file(path: Path, written: FileRecord | None) -> str | None:
    """The problem of a file with this record in the manifest (None: no record), or None if it is intact."""
    if written is None:
        return f"{path} is not in the manifest"
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be read for ever
            return f"{path} has no content: it is a folder, pipe or device"
        size = status.st_size
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
            progress.advance()
            size += len(block)
    return FileRecord(size, digest.hexdigest())


def _map(function: Callable[[str], Result], names: Iterable[str]) -> list[Result]:
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
