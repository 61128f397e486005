"""Files and folders that a command writes at its end, checked before its work starts.

The checks do what writing will do and leave nothing behind: missing folders are made, a block is written and synced,
and all of it is removed. So they also find a full disk, a read-only file system and a name that is too long.
"""

import json
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megatron_fipo.errors import UserError, writing

BLOCK = bytes(4096)


def check_new_folder(folder: Path, setting: str) -> None:
    """Raise UserError, naming `setting`, if the folder exists or cannot be made and written."""
    with _reported(folder, setting):
        if os.path.lexists(folder):
            raise UserError(f"{setting} {folder} already exists; remove it or choose another")
        _write_a_block(folder)


def check_output_file(file: Path, setting: str) -> None:
    """Raise UserError, naming `setting`, if `write_output` could not write the file. An existing file is not changed."""
    with _reported(file, setting):
        if file.is_dir():
            raise UserError(f"{setting} {file} is a folder; give the name of a file")
        if file.exists():
            file.open("ab").close()
        if _replaceable(file):
            _write_a_block(_target(file).parent)


def write_output(file: Path, content: str | bytes) -> None:
    """Write a file, which is complete or as it was before, and make its folder. Text becomes UTF-8. Raises UserError."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    with writing(file):
        if not _replaceable(file):
            file.write_bytes(data)
            return
        file = _target(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{secrets.token_hex(4)}.partial")
        try:
            with partial.open("xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)


def point_link(link: Path, target: str | None) -> None:
    """Point a symbolic link, new or not, to `target` atomically; None removes it. Raises OSError."""
    fresh = link.with_name(f".{link.name}")
    fresh.unlink(missing_ok=True)
    if target is None:
        link.unlink(missing_ok=True)
    else:
        fresh.symlink_to(target)
        fresh.replace(link)


def write_table(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line, as `write_output`."""
    write_output(file, "".join(json.dumps(row) + "\n" for row in rows))


def _replaceable(file: Path) -> bool:
    """Whether the file is new or a regular one, and not a device or a pipe such as /dev/stdout."""
    return file.is_file() or not file.exists()


def _target(file: Path) -> Path:
    """The file that a link points to."""
    return Path(os.path.realpath(file))


def _write_a_block(folder: Path) -> None:
    """Write a block in a folder, which is made for that if it does not exist."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(BLOCK)
            os.fsync(file.fileno())
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


@contextmanager
def _reported(path: Path, setting: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{setting} {path} cannot be written: {error.strerror or error}; choose another path or make this one writable"
        ) from None
