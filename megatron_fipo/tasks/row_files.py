"""The files of a set: one file, the shards in a folder, a folder that Hugging Face `datasets` saved, or those of a pattern.

math.parquet                 one file
snapshot/data                a folder whose files of the format are the shards of one split: train-00000-of-00002.parquet, ...
snapshot/data/train-*.parquet    a pattern: all files that match, in the order of their names
saved/train                  a split that `save_to_disk` wrote; its state.json names the files
"""

import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_fipo.errors import UserError, listed

SUFFIXES = {"parquet": (".parquet",), "jsonl": (".jsonl", ".json"), "arrow": (".arrow",)}
"""By format."""
MAX_STATE_BYTES = 2**24
_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})(-[0-9a-f]+)?\.\w+")
_SAVED_SPLITS, _SAVED_STATE = "dataset_dict.json", "state.json"
"""Files that `datasets` writes: into a folder of several splits, and into that of one."""


def row_files(path: Path, file_format: str) -> list[Path]:
    """The files of a set, in the order of their rows. The path names a file, a folder or a pattern, as above.

    Raises `UserError` if there is none, if a folder has several splits or lacks a shard, and if it has several files that are
    not shards: they may be splits too.
    """
    with access_errors(path):
        if path.is_file():
            return [path]
        if path.is_dir():
            return _in_folder(path, file_format)
        if glob.has_magic(str(path)):
            found = [Path(name) for name in sorted(glob.glob(str(path))) if os.path.isfile(name)]
            if not found:
                raise UserError(f"no file matches {path}; correct the path")
            return found
    raise UserError(f"the data file {path} does not exist; correct the path")


def refuse_missing(path: Path) -> None:
    """Raise UserError if `path` is no file that can be read."""
    with access_errors(path):
        if path.is_dir():
            files = sum(file.is_file() for file in path.iterdir())
            raise UserError(f"the data file {path} is a folder (with {files} files); give a file")
        if not path.is_file():
            raise UserError(f"the data file {path} does not exist; check the path")


@contextmanager
def access_errors(path: Path) -> Iterator[None]:
    """Turn an error of the operating system (permission, a failing disk) into a `UserError`.

    pyarrow's own OSErrors have no errno and pass.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise UserError(
            f"cannot read {path} ({os.strerror(error.errno)}); check its permissions and its disk"
        ) from error


def _in_folder(folder: Path, file_format: str) -> list[Path]:
    if (folder / _SAVED_SPLITS).is_file():
        splits = _names(folder / _SAVED_SPLITS, "splits")
        raise UserError(
            f"{folder} has the splits {listed(splits, 8)} of a data set; give the folder of one of them, such as "
            f"{folder / splits[0]}"
        )
    if (folder / _SAVED_STATE).is_file():
        if file_format != "arrow":
            raise UserError(
                f"data.source is {file_format}, but {folder} is a folder that Hugging Face datasets saved; set data.source=arrow"
            )
        return _saved_files(folder)
    files = sorted(
        file
        for file in folder.iterdir()
        if file.suffix in SUFFIXES[file_format] and not file.name.startswith(".")
    )
    if not files:
        raise UserError(_empty(folder, file_format))
    return files if len(files) == 1 else _shards(folder, files)


def _saved_files(folder: Path) -> list[Path]:
    """The files of a split that `datasets` saved, as its state names them."""
    names = _names(folder / _SAVED_STATE, "_data_files")
    files = [folder / name for name in names]
    for file in files:
        if file.parent != folder or file.name in ("", ".."):
            raise UserError(f"{folder / _SAVED_STATE} names the file {file}, which is not in its folder")
        if not file.is_file():
            raise UserError(
                f"{folder} lacks {file.name}, which its {_SAVED_STATE} names; copy the folder again"
            )
    return files


def _names(path: Path, key: str) -> list[str]:
    """The names that a file of `datasets` lists under a key; entries may be objects with a `filename`."""
    try:
        with path.open("rb") as file:
            state = json.loads(file.read(MAX_STATE_BYTES))
        entries = [entry if isinstance(entry, str) else entry["filename"] for entry in state[key]]
    except (ValueError, TypeError, KeyError, RecursionError):
        entries = []
    if not entries or not all(isinstance(entry, str) for entry in entries):
        raise UserError(
            f"{path} does not list {key} as Hugging Face datasets writes it; save the data set again"
        )
    return entries


def _shards(folder: Path, files: Sequence[Path]) -> list[Path]:
    """Several files of a folder, if they are the shards of one split."""
    shards = [match for file in files if (match := _SHARD.fullmatch(file.name))]
    splits = sorted({shard["split"] for shard in shards})
    suffix = files[0].suffix
    if len(shards) < len(files):
        raise UserError(
            f"{folder} has {len(files)} files, which may be splits ({listed([file.name for file in files], 4)}); give one "
            f"of them, or a pattern such as {folder}/*{suffix} if all belong to the set"
        )
    if len(splits) > 1:
        raise UserError(
            f"{folder} has the splits {listed(splits, 8)}; give the files of one as {folder}/{splits[-1]}-*{suffix}"
        )
    totals = {int(shard["total"]) for shard in shards}
    numbers = [int(shard["number"]) for shard in shards]
    missing = sorted(set(range(max(totals))) - set(numbers))
    if len(totals) > 1 or missing or len(set(numbers)) < len(numbers):
        lacks = (
            f"lacks shard {missing[0]:05d}"
            if missing and len(totals) == 1
            else "has shards of several downloads"
        )
        raise UserError(
            f"{folder} {lacks} of {max(totals)} ({listed([file.name for file in files], 4)}); download it again"
        )
    return list(files)


def _empty(folder: Path, file_format: str) -> str:
    """Why a folder has no files of the format, and what was probably meant."""
    where = (
        f"{folder} is a folder without {' or '.join('*' + suffix for suffix in SUFFIXES[file_format])} files"
    )
    for other, suffixes in SUFFIXES.items():
        if any(file.suffix in suffixes and file.name != "dataset_info.json" for file in folder.iterdir()):
            return f"{where}, but has those of another format; set data.source={other}"
    inside = sorted({file.parent for suffix in SUFFIXES[file_format] for file in folder.glob(f"*/*{suffix}")})
    if inside:
        return f"{where}; its folders {listed([f.name for f in inside], 8)} have some: give {inside[0]}"
    return f"{where}; check data.source and the path"
