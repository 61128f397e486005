"""Trained trajectories on disk, one parquet file per iteration, for `train --replay` without engines.

    rollouts/iteration_000012.parquet     one row per response in training order; groups are contiguous

Columns are the fields of `Trajectory` under their names (`extra` as JSON), so any parquet reader can show
what a run was trained on. The routes of experts are left out: they would be most of the file. Reading returns
what was written, floats bit for bit. Pages have checksums, and a file that exists is complete.
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

import numpy as np
import pyarrow
import pyarrow.parquet

from megatron_fipo.batching.trajectory import Trajectory, VersionSpan, covers
from megatron_fipo.driver.rollout.collect_counts import CollectCounts
from megatron_fipo.driver.rollout.collector import Collected
from megatron_fipo.driver.rollout.replies import outside_vocabulary
from megatron_fipo.driver.rollout.trajectories import ScoredGroup
from megatron_fipo.errors import UserError, first_line, writing

FORMAT = 3
HEADER = b"megatron_fipo"
"""Key in the schema's metadata. The value is JSON: `format`, `iteration` (from 1) and sampling
`temperature`."""
GROUPS_AT_ONCE = 32
"""Groups in a row group, the part that is in memory twice."""
TOKENS = {
    "prompt_ids": pyarrow.int32(),
    "response_ids": pyarrow.int32(),
    "response_mask": pyarrow.int8(),
    "rollout_log_probs": pyarrow.float32(),
}
SPAN = pyarrow.struct(
    [pyarrow.field(name, pyarrow.int64(), nullable=False) for name in ("version", "start", "end")]
)


def _list_of(kind: pyarrow.DataType) -> pyarrow.DataType:
    return pyarrow.list_(pyarrow.field("element", kind, nullable=False))


COLUMNS: dict[str, pyarrow.DataType] = {
    "group_id": pyarrow.string(),
    **{name: _list_of(kind) for name, kind in TOKENS.items()},
    "spans": _list_of(SPAN),
    "finish_reason": pyarrow.string(),
    "reward": pyarrow.float64(),
    "accuracy": pyarrow.float64(),
    "advantage": pyarrow.float64(),
    "extra": pyarrow.string(),
    "set_name": pyarrow.string(),
}


def _schema(columns: dict[str, pyarrow.DataType]) -> pyarrow.Schema:
    return pyarrow.schema([pyarrow.field(name, kind, nullable=False) for name, kind in columns.items()])


SCHEMA = _schema(COLUMNS)
_WITHOUT_SETS = {name: kind for name, kind in COLUMNS.items() if name != "set_name"}
SCHEMAS = {
    FORMAT: SCHEMA,
    2: _schema(_WITHOUT_SETS),
    1: _schema(_WITHOUT_SETS | {"rollout_log_probs": _list_of(pyarrow.float64())}),
}
"""By format. Format 2 had no sets. Format 1 also had float32 log-probs as float64."""


def dump_path(folder: Path, iteration: int) -> Path:
    return folder / f"iteration_{iteration:06d}.parquet"


def write_dump(
    folder: Path, iteration: int, groups: Sequence[Sequence[Trajectory]], temperature: float
) -> Path:
    """Write the groups of iteration `iteration` (from 1), sampled at `temperature`; returns the file.

    An earlier file of the same iteration is replaced atomically. Raises `UserError` if the disk cannot be
    written or an `extra` is not JSON, ValueError for groups that a reader could not tell apart; then no part
    of the new file remains.
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


def read_dump(path: Path) -> list[ScoredGroup]:
    """The groups of a dump.

    Raises `UserError` for a file that is missing, damaged, or not a dump of this format.
    """
    with _opened(path) as file:
        rows = [
            row for index in range(file.num_row_groups) for row in _trajectories(file.read_row_group(index))
        ]
    return [list(group) for _, group in groupby(rows, key=lambda trajectory: trajectory.group_id)]


def read_header(path: Path) -> dict[str, Any]:
    """`iteration` and `temperature` of a dump. Raises the errors of `read_dump`."""
    with _opened(path) as file:
        return _header(path, file)


class DumpFolder:
    """A folder of dumps to replay."""

    def __init__(self, folder: Path, temperature: float, vocab_size: int) -> None:
        """Raises `UserError` for a folder without dumps and for a dump sampled at another temperature."""
        self.folder = folder
        self.vocab_size = vocab_size
        found = (re.fullmatch(r"iteration_(\d{6,})\.parquet", path.name) for path in folder.glob("*.parquet"))
        self.iterations = sorted(int(match[1]) for match in found if match)
        if not self.iterations:
            raise UserError(
                f"{folder} contains no iteration_*.parquet; give the rollouts folder of a run with "
                "rollout.dump_every=1"
            )
        for iteration in self.iterations:
            path = dump_path(folder, iteration)
            header = read_header(path)
            if header["iteration"] != iteration:
                raise UserError(f"{path} was written as iteration {header['iteration']}; rename it back")
            if header["temperature"] != temperature:
                raise UserError(
                    f"{path} was sampled at temperature {header['temperature']}, but "
                    f"rollout.temperature={temperature}; old and new log-probs must have the same "
                    f"temperature: set rollout.temperature={header['temperature']}"
                )

    def groups(self, iteration: int) -> Collected:
        """The groups that iteration `iteration` (from 1) trains on.

        Raises `UserError` if it was not dumped or does not fit: ids outside the vocabulary, groups of
        different sizes.
        """
        path = dump_path(self.folder, iteration)
        if iteration not in self.iterations:
            raise UserError(
                f"{self.folder} has no {path.name}, only {len(self.iterations)} iterations from "
                f"{self.iterations[0]} to {self.iterations[-1]}; dump with rollout.dump_every=1 or lower "
                "iterations"
            )
        groups = read_dump(path)
        sizes = {group[0].group_id: len(group) for group in groups}
        if len(sizes) < len(groups) or len(set(sizes.values())) != 1:
            raise UserError(
                f"{path} has groups of {sorted(set(sizes.values()))} responses, but all must have one size; "
                "dump it again"
            )
        for trajectory in (trajectory for group in groups for trajectory in group):
            if fault := _fault(trajectory, self.vocab_size):
                raise UserError(
                    f"{path}: a response of group {trajectory.group_id} {fault}; replay with the model that "
                    "sampled it"
                )
        tokens = sum(trajectory.sampled_tokens for group in groups for trajectory in group)
        return Collected(groups, CollectCounts(from_earlier=len(groups), used_tokens=tokens))


def _table(rows: Sequence[Trajectory], schema: pyarrow.Schema) -> pyarrow.Table:
    values: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in COLUMNS}
    values["spans"] = [[asdict(span) for span in row.spans] for row in rows]
    values["extra"] = [_to_json(row) for row in rows]
    columns = [
        _lists(values[name], kind) if name in TOKENS else pyarrow.array(values[name], kind)
        for name, kind in COLUMNS.items()
    ]
    return pyarrow.table(columns, schema=schema)


def _lists(arrays: Sequence[np.ndarray], kind: pyarrow.ListType) -> pyarrow.Array:
    """A column of lists from one array per row, without a Python object per number."""
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    flat = np.concatenate([kind.value_type.to_pandas_dtype()([]), *arrays])
    return pyarrow.ListArray.from_arrays(offsets, pyarrow.array(flat, kind.value_type), type=kind)


def _to_json(row: Trajectory) -> str:
    try:
        return json.dumps(row.extra)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the reward's extra values of group {row.group_id} cannot be dumped ({error}); return JSON "
            "values"
        ) from error


@contextmanager
def _opened(path: Path) -> Iterator[pyarrow.parquet.ParquetFile]:
    """Open a dump and check its form. Errors while it is open become a `UserError` with one sentence."""
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            header = _header(path, file)
            if not file.schema_arrow.equals(SCHEMAS[header["format"]]):
                raise ValueError("its columns differ from a dump's")
            yield file
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # a damaged page may raise any of them
        if isinstance(error, OSError) and error.errno is not None:  # errors of pyarrow itself have no errno
            raise UserError(
                f"cannot read {path} ({os.strerror(error.errno)}); check the folder and its permissions"
            ) from error
        raise UserError(
            f"{path} is not a readable dump ({first_line(error)}); it is damaged: dump it again or remove it"
        ) from error


def _header(path: Path, file: pyarrow.parquet.ParquetFile) -> dict[str, Any]:
    text = (file.schema_arrow.metadata or {}).get(HEADER)
    if text is None:
        raise UserError(f"{path} is a parquet file, but not a dump; give the rollouts folder of a run")
    header = json.loads(text)
    if not isinstance(header, dict) or not {"format", "iteration", "temperature"} <= header.keys():
        raise ValueError("its header is incomplete")
    if header["format"] not in SCHEMAS:
        raise UserError(
            f"{path} has format {header['format']}, but this version reads {', '.join(sorted(map(str, SCHEMAS)))}; "
            "use the version that wrote it"
        )
    return header


def _trajectories(table: pyarrow.Table) -> list[Trajectory]:
    columns: dict[str, list[Any]] = {
        name: _arrays(table[name]) if name in TOKENS else table[name].to_pylist()
        for name in table.column_names
    }
    columns["spans"] = [[VersionSpan(**span) for span in spans] for spans in columns["spans"]]
    columns["extra"] = [json.loads(text) for text in columns["extra"]]
    return [Trajectory(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]


def _arrays(column: pyarrow.ChunkedArray) -> list[np.ndarray]:
    """One array per row of a column of lists: views of the column."""
    array = column.combine_chunks()
    flat, offsets = array.values.to_numpy(), array.offsets.to_numpy().tolist()
    return [flat[start:end] for start, end in pairwise(offsets)]


def _fault(trajectory: Trajectory, vocab_size: int) -> str | None:
    """Why a model with this vocabulary cannot be trained on the response, or None."""
    if not len(trajectory.prompt_ids) or not len(trajectory.response_ids):
        return "has no prompt or no response tokens"
    ids = np.concatenate([trajectory.prompt_ids, trajectory.response_ids])
    if (invalid := outside_vocabulary(ids, vocab_size)) is not None:
        return f"has the token id {invalid}, but the model's vocabulary has {vocab_size}"
    if {len(trajectory.response_mask), len(trajectory.rollout_log_probs)} != {trajectory.response_length}:
        return "has a mask or log-probs whose length differs from its tokens"
    if not covers(trajectory.spans, trajectory.response_length):
        return "has weight versions that do not cover its tokens"
    return None
