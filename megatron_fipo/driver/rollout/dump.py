"""Trained trajectories on disk, one parquet file per iteration, and a run that trains on them again without engines.

    rollouts/iteration_000012.parquet     one row per response, in the order of training; responses of a group lie together

Columns are the fields of `Trajectory` by their names (`extra` as JSON), so any parquet reader shows what a run was trained on. What is
read back equals what was written, floats bit for bit. Pages carry checksums, and a file that shows is complete.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megatron_fipo.batching.trajectory import Trajectory, VersionSpan
from megatron_fipo.driver.rollout.collector import CollectCounts, Collected
from megatron_fipo.driver.rollout.prompt_group import Group
from megatron_fipo.errors import UserError, first_line, writing

FORMAT = 1
HEADER = b"megatron_fipo"
"""Key of the schema's metadata; JSON of `format`, `iteration` (from 1) and `temperature` (of sampling)."""
GROUPS_AT_ONCE = 32
"""Groups in a row group, which is what is in memory twice."""
FLAT_LISTS = {"prompt_ids": pyarrow.int32(), "response_ids": pyarrow.int32(), "response_mask": pyarrow.int8()}
FLAT_LISTS |= {"rollout_log_probs": pyarrow.float64()}
SPAN = pyarrow.struct(
    [pyarrow.field(name, pyarrow.int64(), nullable=False) for name in ("version", "start", "end")]
)
COLUMNS: dict[str, pyarrow.DataType] = {
    "group_id": pyarrow.string(),
    **{
        name: pyarrow.list_(pyarrow.field("element", kind, nullable=False))
        for name, kind in FLAT_LISTS.items()
    },
    "spans": pyarrow.list_(pyarrow.field("element", SPAN, nullable=False)),
    "finish_reason": pyarrow.string(),
    "reward": pyarrow.float64(),
    "accuracy": pyarrow.float64(),
    "advantage": pyarrow.float64(),
    "extra": pyarrow.string(),
}
SCHEMA = pyarrow.schema([pyarrow.field(name, kind, nullable=False) for name, kind in COLUMNS.items()])


def dump_path(folder: Path, iteration: int) -> Path:
    return folder / f"iteration_{iteration:06d}.parquet"


def write_dump(
    folder: Path, iteration: int, groups: Sequence[Sequence[Trajectory]], temperature: float
) -> Path:
    """Write the groups that iteration `iteration` (from 1) trains on, sampled at `temperature`; returns the file.

    An earlier file of the same iteration is replaced at once. Raises `UserError` for a disk that refuses and for an `extra` that is
    not JSON, ValueError for groups that could not be told apart when read; then nothing of the new file stays.
    """
    ids = [group[0].group_id for group in groups if group]
    if len(set(ids)) < len(groups) or any(
        trajectory.group_id != i for i, g in zip(ids, groups, strict=False) for trajectory in g
    ):
        raise ValueError("groups must not be empty, and each must have one group_id that no other has")
    header = {"format": FORMAT, "iteration": iteration, "temperature": temperature}
    path = dump_path(folder, iteration)
    partial = folder / f".{path.name}"
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            schema = SCHEMA.with_metadata({HEADER: json.dumps(header).encode()})
            with pyarrow.parquet.ParquetWriter(
                partial, schema, compression="zstd", write_page_checksum=True
            ) as writer:
                for start in range(0, len(groups), GROUPS_AT_ONCE):
                    writer.write_table(
                        _table([t for group in groups[start : start + GROUPS_AT_ONCE] for t in group], schema)
                    )
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return path


def read_dump(path: Path) -> list[Group]:
    """The groups of a dump. Raises `UserError` for a file that is missing, damaged, or not a dump of this format."""
    with _opened(path) as file:
        rows = [
            row for index in range(file.num_row_groups) for row in _trajectories(file.read_row_group(index))
        ]
    return [list(group) for _, group in groupby(rows, key=lambda trajectory: trajectory.group_id)]


def read_header(path: Path) -> dict[str, Any]:
    """`iteration` and `temperature` of a dump. Raises `UserError` as `read_dump`."""
    with _opened(path) as file:
        return _header(path, file)


class ReplaySource:
    """The dumps of a folder as the groups of a run. `UserError` for an empty folder or a dump at another temperature."""

    def __init__(self, folder: Path, temperature: float, vocab_size: int) -> None:
        self.folder = folder
        self.vocab_size = vocab_size
        found = (re.fullmatch(r"iteration_(\d{6,})\.parquet", path.name) for path in folder.glob("*.parquet"))
        self.iterations = sorted(int(match[1]) for match in found if match)
        if not self.iterations:
            raise UserError(
                f"{folder} holds no iteration_*.parquet; give the rollouts folder of a run with rollout.dump_every=1"
            )
        for iteration in self.iterations:
            path = dump_path(folder, iteration)
            header = read_header(path)
            if header["iteration"] != iteration:
                raise UserError(
                    f"{path} was written as iteration {header['iteration']}; give the file its own name back"
                )
            if header["temperature"] != temperature:
                raise UserError(
                    f"{path} was sampled at temperature {header['temperature']}, but rollout.temperature={temperature}, and old and "
                    f"new log-probs have to be of one distribution; set rollout.temperature={header['temperature']}"
                )

    def groups(self, iteration: int) -> Collected:
        """What iteration `iteration` (from 1) trains on.

        Raises `UserError` where it was not dumped, or does not fit: ids beyond the vocabulary, groups of different sizes.
        """
        path = dump_path(self.folder, iteration)
        if iteration not in self.iterations:
            raise UserError(
                f"{self.folder} has no {path.name}, only {len(self.iterations)} iterations from {self.iterations[0]} to "
                f"{self.iterations[-1]}; dump with rollout.dump_every=1 or lower iterations"
            )
        groups = read_dump(path)
        sizes = {group[0].group_id: len(group) for group in groups}
        if len(sizes) < len(groups) or len(set(sizes.values())) != 1:
            raise UserError(
                f"{path} has groups of {sorted(set(sizes.values()))} responses, not all of one size; dump it again"
            )
        for trajectory in (trajectory for group in groups for trajectory in group):
            if fault := _fault(trajectory, self.vocab_size):
                raise UserError(
                    f"{path}: a response of group {trajectory.group_id} {fault}; replay with the model that sampled it"
                )
        tokens = sum(trajectory.response_length for group in groups for trajectory in group)
        return Collected(groups, CollectCounts(from_earlier=len(groups), used_tokens=tokens))


def _table(rows: Sequence[Trajectory], schema: pyarrow.Schema) -> pyarrow.Table:
    values: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in COLUMNS}
    values["spans"] = [[asdict(span) for span in row.spans] for row in rows]
    values["extra"] = [_to_json(row) for row in rows]
    return pyarrow.table([pyarrow.array(values[name], kind) for name, kind in COLUMNS.items()], schema=schema)


def _to_json(row: Trajectory) -> str:
    try:
        return json.dumps(row.extra)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"what the reward wants logged of group {row.group_id} cannot be dumped ({error}); return JSON values"
        ) from error


@contextmanager
def _opened(path: Path) -> Iterator[pyarrow.parquet.ParquetFile]:
    """A dump, checked to be one; whatever is wrong with it while it is open, as a sentence."""
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            _header(path, file)
            if not file.schema_arrow.equals(SCHEMA):
                raise ValueError("it has other columns")
            yield file
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # a damaged page raises any of the three
        if isinstance(error, OSError) and error.errno is not None:  # pyarrow's own have no number
            raise UserError(
                f"cannot read {path} ({os.strerror(error.errno)}); check the folder and its permissions"
            ) from error
        raise UserError(
            f"{path} is not a readable dump ({first_line(error)}); it is damaged: dump it again or leave it out"
        ) from error


def _header(path: Path, file: pyarrow.parquet.ParquetFile) -> dict[str, Any]:
    text = (file.schema_arrow.metadata or {}).get(HEADER)
    if text is None:
        raise UserError(f"{path} is a parquet file, but no dump of a run; give the rollouts folder of a run")
    header = json.loads(text)
    if not isinstance(header, dict) or not {"format", "iteration", "temperature"} <= header.keys():
        raise ValueError("its header is not whole")
    if header["format"] != FORMAT:
        raise UserError(
            f"{path} has format {header['format']}, but this version reads {FORMAT}; use the version that wrote it"
        )
    return header


def _trajectories(table: pyarrow.Table) -> list[Trajectory]:
    columns: dict[str, list[Any]] = {
        name: _lists(table[name]) if name in FLAT_LISTS else table[name].to_pylist() for name in COLUMNS
    }
    columns["spans"] = [[VersionSpan(**span) for span in spans] for spans in columns["spans"]]
    columns["extra"] = [json.loads(text) for text in columns["extra"]]
    return [Trajectory(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]


def _lists(column: pyarrow.ChunkedArray) -> list[list[Any]]:
    """What `to_pylist` gives for lists of numbers, by way of numpy: a run's tokens would take it minutes."""
    array = column.combine_chunks()
    flat, offsets = array.values.to_numpy(), array.offsets.to_numpy().tolist()
    return [flat[start:end].tolist() for start, end in pairwise(offsets)]


def _fault(trajectory: Trajectory, vocab_size: int) -> str | None:
    """Why a model with this vocabulary cannot be trained on the response, if it cannot."""
    ids = trajectory.prompt_ids + trajectory.response_ids
    if not trajectory.prompt_ids or not trajectory.response_ids:
        return "has no prompt or no response tokens"
    if min(ids) < 0 or max(ids) >= vocab_size:
        return f"has the token id {min(ids) if min(ids) < 0 else max(ids)}, but the model's vocabulary has {vocab_size}"
    if {len(trajectory.response_mask), len(trajectory.rollout_log_probs)} != {trajectory.response_length}:
        return "has mask or log-probs of another length than its tokens"
    starts, ends = [span.start for span in trajectory.spans], [span.end for span in trajectory.spans]
    if [*starts, trajectory.response_length] != [0, *ends]:
        return "has weight versions that do not cover its tokens"
    return None
