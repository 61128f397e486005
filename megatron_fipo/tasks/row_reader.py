"""Files with one problem per row, read as a stream: parquet, JSON lines, and Arrow as Hugging Face `datasets` saves it."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from megatron_fipo.errors import UserError, first_line
from megatron_fipo.placeholders import HEAD_BYTES, placeholder
from megatron_fipo.tasks import strict_json
from megatron_fipo.tasks.arrow_types import field_path, projected, readable_fields
from megatron_fipo.tasks.row import ColumnNames, columns_advice
from megatron_fipo.tasks.row_files import access_errors, refuse_missing


@dataclass(frozen=True)
class Wanted:
    """What is read of each row. A dot names a field of an object."""

    columns: Sequence[str] = ColumnNames().all
    required: Mapping[str, str] = field(default_factory=dict)
    """Columns that a file must have, with their names in `data.columns`."""
    others: bool = False
    """Also all other columns whose values are those of JSON."""
    left_out: set[str] = field(default_factory=set)
    """Receives the names of the other columns, which have bytes, dates and the like."""


def wanted_of(names: ColumnNames, others: bool = False) -> Wanted:
    """The columns of problems."""
    required = {names.prompt: "prompt", names.ground_truth: "ground_truth"}
    return Wanted(names.all, required, others)


BATCH_ROWS = 4096
MAX_LINE_BYTES = 64 * 2**20
MAX_ROW_GROUP_BYTES = 4 * 2**30
"""Of the columns that are read, uncompressed. A page has at most 2 GiB by its format."""
MAX_FOOTER_BYTES = 100_000_000

NumberedRows = Iterator[tuple[int, dict[str, Any]]]
DEFAULT = wanted_of(ColumnNames())

_SIGNATURES = (
    (b"PAR1", "parquet", "is a parquet file; set data.source=parquet"),
    (b"{", "jsonl", "looks like JSON lines; set data.source=jsonl"),
    (b"\x1f\x8b", "", "is compressed by gzip; decompress it"),
    (b"BZh", "", "is compressed by bzip2; decompress it"),
    (b"\xfd7zXZ", "", "is compressed by xz; decompress it"),
    (b"\x28\xb5\x2f\xfd", "", "is compressed by zstd; decompress it"),
    (b"PK\x03\x04", "", "is a zip archive; unpack it"),
    (b"ARROW1", "arrow", "is an Arrow file; set data.source=arrow"),
    (b"\xff\xff\xff\xff", "arrow", "is an Arrow stream; set data.source=arrow"),
    (b"\xff\xfe", "", "is text in UTF-16; save it as UTF-8"),
    (b"\xfe\xff", "", "is text in UTF-16; save it as UTF-8"),
    (b"<", "", "is a web page or XML, not rows; download the data file itself"),
    (b"[", "", "is one JSON list; write one object per line"),
)
"""First bytes of a file (after a UTF-8 byte order mark and blanks), the format they belong to, and what to do
if another format was configured."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_rows(path: Path, file_format: str, wanted: Wanted = DEFAULT) -> NumberedRows:
    """Yield (number, row) of a file in one of the formats of `ROW_UNITS`, which names what is counted.

    JSON lines have all columns, other files those that are wanted. Raises `UserError` that names the file if it is missing,
    is of another format or cannot be read, and the line if that is damaged.
    """
    refuse_missing(path)
    if signature := _foreign_signature(path, file_format):
        raise UserError(f"data.source is {file_format}, but {path} {signature}")
    return _READERS[file_format](path, wanted)


def find_format(path: Path) -> tuple[str, list[str]]:
    """The format of a file, `parquet` or `jsonl`, by its first bytes, and its columns (of JSON lines: those of the first).

    Raises `UserError` as `read_rows`.
    """
    refuse_missing(path)
    if _foreign_signature(path, "parquet") is None and _head(path).startswith(b"PAR1"):
        with _parquet_file(path) as file:
            return "parquet", file.schema_arrow.names
    if signature := _foreign_signature(path, "jsonl"):
        raise UserError(f"{path} {signature}")
    first = next(_read_jsonl(path, DEFAULT), None)
    if first is None:
        raise UserError(f"{path} has no rows; download it again")
    return "jsonl", list(first[1])


def _head(path: Path) -> bytes:
    with access_errors(path), path.open("rb") as file:
        return file.read(HEAD_BYTES).removeprefix(_BYTE_ORDER_MARK).lstrip()


def _foreign_signature(path: Path, file_format: str) -> str | None:
    """What the file is instead of this format, and what to do; None if its first bytes permit the format."""
    head = _head(path)
    if advice := placeholder(head):
        return advice
    others = (
        advice
        for signature, belongs_to, advice in _SIGNATURES
        if head.startswith(signature) and belongs_to != file_format
    )
    return next(others, None)


def _read_parquet(path: Path, wanted: Wanted) -> NumberedRows:
    """Yield (row number from 0, row), with a few thousand rows in memory at a time."""
    number = 0
    with _parquet_file(path, lambda: number) as file:
        names = _selected(path, file.schema_arrow, file.metadata.num_rows, wanted)
        _refuse_large_groups(path, file.metadata, names)
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=names):
            for row in batch.to_pylist():
                yield number, row
                number += 1


def _read_arrow(path: Path, wanted: Wanted) -> NumberedRows:
    """As `_read_parquet`. A stream, which `datasets` writes, or a file with a footer."""
    number = 0
    with (
        _damage(path, "Arrow", lambda: number),
        pyarrow.memory_map(str(path)) as memory,
        (pyarrow.ipc.open_file if _head(path).startswith(b"ARROW1") else pyarrow.ipc.open_stream)(
            memory
        ) as file,
    ):
        batches = (
            (file.get_batch(index) for index in range(file.num_record_batches))
            if isinstance(file, pyarrow.RecordBatchFileReader)
            else iter(file)
        )
        names = _selected(path, file.schema, 1, wanted)
        for batch in batches:
            for start in range(0, batch.num_rows, BATCH_ROWS):
                for row in projected(batch.slice(start, BATCH_ROWS), names).to_pylist():
                    yield number, row
                    number += 1


@contextmanager
def _parquet_file(
    path: Path, rows_read: Callable[[], int] = lambda: 0
) -> Iterator[pyarrow.parquet.ParquetFile]:
    """An open parquet file."""
    with (
        _damage(path, "parquet", rows_read),
        pyarrow.parquet.ParquetFile(path, thrift_string_size_limit=MAX_FOOTER_BYTES) as file,
    ):
        yield file


@contextmanager
def _damage(path: Path, kind: str, rows_read: Callable[[], int]) -> Iterator[None]:
    """What pyarrow raises for a damaged file becomes a `UserError`."""
    try:
        with access_errors(path):
            yield
    # A damaged page or a date beyond Python's raises any of these.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        number = rows_read()
        fault = f"cannot be read from row {number} on" if number else f"is not a readable {kind} file"
        raise UserError(f"{path} {fault} ({first_line(error)}); check data.source and the file") from error


def _selected(path: Path, schema: pyarrow.Schema, rows: int, wanted: Wanted) -> list[str]:
    """What to read: columns, and fields of objects with a dot. Other fields of an object are left out, whatever their types."""
    for name in wanted.columns:
        column = name if name in schema.names else name.partition(".")[0]
        count = schema.names.count(column)
        if count > 1:
            raise UserError(f"{path} has {count} columns `{column}`; remove all but one")
        if not count and rows and name in wanted.required:
            advice = columns_advice(wanted.required[name], schema.names, "columns")
            raise UserError(f"{path} has no column `{column}`; {advice}")
    found = [field_path(schema, name) for name in wanted.columns]
    selected = [name for name in found if name is not None]
    if wanted.others:
        readable, unreadable = readable_fields(schema)
        selected += [name for name in readable if name not in selected]
        wanted.left_out.update(name for name in unreadable if name not in selected)
    whole = set(selected)
    return [name for name in dict.fromkeys(selected) if name.partition(".")[0] not in whole - {name}]


def _refuse_large_groups(path: Path, metadata: pyarrow.parquet.FileMetaData, columns: list[str]) -> None:
    """`UserError` for a row group whose columns would take more than `MAX_ROW_GROUP_BYTES`, for example when it is decompressed."""
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        parts = [group.column(index) for index in range(group.num_columns)]
        size = sum(
            part.total_uncompressed_size
            for part in parts
            if any(
                part.path_in_schema == column or part.path_in_schema.startswith(f"{column}.")
                for column in columns
            )
        )
        if size > MAX_ROW_GROUP_BYTES:
            raise UserError(
                f"{path} has {size / 2**30:.1f} GiB of prompts and answers in its row group {number}, of which at most "
                f"{MAX_ROW_GROUP_BYTES / 2**30:g} GiB are read at one time; write it with smaller row groups"
            )


def _read_jsonl(path: Path, _: Wanted) -> NumberedRows:
    """Yield (line number from 1, row) for each line that is not blank."""
    with access_errors(path), path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
            if len(line) > MAX_LINE_BYTES:
                raise UserError(
                    f"{path} line {number} has more than {MAX_LINE_BYTES // 2**20} MiB; write one row per line"
                )
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if line.strip():
                yield number, _parse_line(f"{path} line {number}", line)


def _parse_line(where: str, line: bytes) -> dict[str, Any]:
    try:
        row = strict_json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where} is not JSON ({error.msg}, column {error.colno}); write one complete object per line"
        ) from error
    except ValueError as error:
        # a repeated key, a number of thousands of digits, thousands of nested brackets
        raise UserError(f"{where} cannot be read ({error}); fix the line") from error
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object; write one object per line")
    return row


_READERS: dict[str, Callable[[Path, Wanted], NumberedRows]] = {
    "parquet": _read_parquet,
    "jsonl": _read_jsonl,
    "arrow": _read_arrow,
}
ROW_UNITS = {"parquet": "row", "jsonl": "line", "arrow": "row"}
"""What the numbers of `read_rows` count: rows from 0, lines from 1."""
