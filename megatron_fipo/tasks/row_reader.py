"""Files with one problem per row, read as a stream: parquet and JSON lines."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megatron_fipo.errors import UserError, first_line, listed
from megatron_fipo.placeholders import HEAD_BYTES, placeholder
from megatron_fipo.tasks import strict_json

COLUMNS = {"prompt": None, "reward_model": "ground_truth", "data_source": None, "extra_info": "index"}
"""The columns that are read, and of an object its field."""
PARQUET_BATCH_ROWS = 4096

NumberedRows = Iterator[tuple[int, dict[str, Any]]]

_SIGNATURES = (
    (b"PAR1", "parquet", "is a parquet file; set data.source=parquet"),
    (b"{", "jsonl", "looks like JSON lines; set data.source=jsonl"),
    (b"\x1f\x8b", "", "is compressed by gzip; decompress it"),
    (b"BZh", "", "is compressed by bzip2; decompress it"),
    (b"\xfd7zXZ", "", "is compressed by xz; decompress it"),
    (b"\x28\xb5\x2f\xfd", "", "is compressed by zstd; decompress it"),
    (b"PK\x03\x04", "", "is a zip archive; unpack it"),
    (b"ARROW1", "", "is an Arrow file; write it as parquet"),
    (b"\xff\xfe", "", "is text in UTF-16; save it as UTF-8"),
    (b"\xfe\xff", "", "is text in UTF-16; save it as UTF-8"),
    (b"<", "", "is a web page or XML, not rows; download the data file itself"),
    (b"[", "", "is one JSON list; write one object per line"),
)
"""First bytes of a file (after a UTF-8 byte order mark and blanks), the format they belong to, and what to do
if another format was configured."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_rows(path: Path, file_format: str) -> NumberedRows:
    """Yield (number, row) of a file in the format `parquet` or `jsonl`; `ROW_UNITS` names what is counted.

    Raises `UserError` that names the file if it is missing, is of another format or cannot be read, and the
    line if that is damaged.
    """
    with _access_errors(path):
        if path.is_dir():
            files = sum(file.is_file() for file in path.iterdir())
            raise UserError(
                f"the data file {path} is a folder (with {files} files); merge its rows into one file and "
                "give its path"
            )
        if not path.is_file():
            raise UserError(
                f"the data file {path} does not exist; check data.train_path and data.evaluation_path"
            )
    _refuse_other_format(path, file_format)
    return _READERS[file_format](path)


def _refuse_other_format(path: Path, file_format: str) -> None:
    with _access_errors(path), path.open("rb") as file:
        head = file.read(HEAD_BYTES).removeprefix(_BYTE_ORDER_MARK).lstrip()
    if advice := placeholder(head):
        raise UserError(f"data.source is {file_format}, but {path} {advice}")
    for signature, belongs_to, advice in _SIGNATURES:
        if head.startswith(signature) and belongs_to != file_format:
            raise UserError(f"data.source is {file_format}, but {path} {advice}")


def _read_parquet(path: Path) -> NumberedRows:
    """Yield (row number from 0, row), with a few thousand rows in memory at a time."""
    number = 0
    try:
        with _access_errors(path), pyarrow.parquet.ParquetFile(path) as file:
            columns = _columns(path, file.schema_arrow, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=columns):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1
    # A damaged page or a date beyond Python's raises any of these.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        fault = f"cannot be read from row {number} on" if number else "is not a readable parquet file"
        raise UserError(f"{path} {fault} ({first_line(error)}); check data.source and the file") from error


def _columns(path: Path, schema: pyarrow.Schema, rows: int) -> list[str]:
    """What to read of a parquet file; other fields of an object are left out, whatever their types."""
    for column in COLUMNS:
        count = schema.names.count(column)
        if count > 1:
            raise UserError(f"{path} has {count} columns `{column}`; remove all but one")
        if not count and rows and column in ("prompt", "reward_model"):
            raise UserError(f"{path} has no column `{column}`; its columns are {named(schema.names)}")
    found = []
    for column, field in COLUMNS.items():
        if column in schema.names:
            kind = schema.field(column).type
            has_field = field and pyarrow.types.is_struct(kind) and kind.get_field_index(field) >= 0
            found.append(f"{column}.{field}" if has_field else column)
    return found


def named(names: Sequence[str]) -> str:
    """Names of columns or keys for a message, on one line."""
    return listed([name if name.isprintable() else ascii(name) for name in names], 12)


def _read_jsonl(path: Path) -> NumberedRows:
    """Yield (line number from 1, row) for each line that is not blank."""
    with _access_errors(path), path.open("rb") as file:
        for number, line in enumerate(file, start=1):
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
    except (
        ValueError
    ) as error:  # a repeated key, a number of thousands of digits, thousands of nested brackets
        raise UserError(f"{where} cannot be read ({error}); fix the line") from error
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object; write one object per line")
    return row


@contextmanager
def _access_errors(path: Path) -> Iterator[None]:
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


_READERS: dict[str, Callable[[Path], NumberedRows]] = {"parquet": _read_parquet, "jsonl": _read_jsonl}
ROW_UNITS = {"parquet": "row", "jsonl": "line"}
"""What the numbers of `read_rows` count: rows from 0, lines from 1."""
