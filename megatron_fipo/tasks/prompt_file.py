"""The data sources `parquet` and `jsonl`: problems from a file with one problem per row.

Columns: `prompt`, `reward_model.ground_truth`, `data_source`, `extra_info.index`. Files are read as a stream,
and a duplicate prompt is dropped before it is tokenized: the published training file of DAPO repeats 17
thousand prompts about a hundred times.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megatron_fipo.config import DataConfig
from megatron_fipo.errors import UserError, first_line
from megatron_fipo.tasks.task import EncodePrompt, Log, Problem, Prompt

logger = logging.getLogger(__name__)

COLUMNS = ("prompt", "reward_model", "data_source", "extra_info")
PARQUET_BATCH_ROWS = 4096

NumberedRows = Iterator[tuple[int, dict[str, Any]]]


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


def read_parquet(path: Path) -> NumberedRows:
    """Yield (row number from 0, row) of a parquet file, with a few thousand rows in memory at a time."""
    number = 0
    try:
        with _access_errors(path), pyarrow.parquet.ParquetFile(path) as file:
            columns = [name for name in COLUMNS if name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=columns):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # a damaged page raises any of these
        fault = f"cannot be read from row {number} on" if number else "is not a readable parquet file"
        raise UserError(f"{path} {fault} ({first_line(error)}); check data.source and the file") from error


def read_jsonl(path: Path) -> NumberedRows:
    """Yield (line number from 1, row) for each line of a JSON lines file that is not blank."""
    with _access_errors(path), path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path} line {number} is not UTF-8 (byte {error.start + 1}); save the file as UTF-8"
                ) from error
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path} line {number} is not JSON ({error.msg}, column {error.colno}); fix the line"
                ) from error
            except (ValueError, RecursionError) as error:
                # A number of thousands of digits, or thousands of nested brackets.
                raise UserError(
                    f"{path} line {number} is beyond what can be read ({error}); fix the line"
                ) from error
            if not isinstance(row, dict):
                raise UserError(f"{path} line {number} is not a JSON object; write one object per line")
            yield number, row


READERS: dict[str, tuple[str, Callable[[Path], NumberedRows]]] = {
    "parquet": ("row", read_parquet),
    "jsonl": ("line", read_jsonl),
}
"""By file format: what its row numbers count, and the reader."""


def file_problems(
    config: DataConfig, encode: EncodePrompt, *, held_out: bool, seed: int, log: Log
) -> list[Problem]:
    """The data sources `parquet` and `jsonl`, as `DataSource`. The file order does not depend on the seed."""
    path = config.evaluation_path if held_out else config.train_path
    if path is None and held_out:
        return []
    if path is None:
        raise UserError(f"data.source is {config.source} but data.train_path is not set; give the file")
    return read_problems(Path(path), config.source, encode, config.deduplicate, log)


def read_problems(
    path: Path,
    file_format: str,
    encode: EncodePrompt,
    deduplicate: bool,
    log: Log = logger.info,
) -> list[Problem]:
    """All problems of a file, in file order.

    With `deduplicate`, only the first of the rows with the same prompt is used; `log` receives the number of
    rows dropped. A problem's id is its `extra_info.index`, or its row number if it has none, or both if the
    index is a repeated one. Raises `UserError` that names the file if it cannot be read, and the row or line
    if it has no prompt or answer, or a prompt above the limit.
    """
    with _access_errors(path):
        if not path.is_file():
            raise UserError(
                f"the data file {path} does not exist; check data.train_path and data.evaluation_path"
            )
    unit, reader = READERS[file_format]
    problems: dict[str, Problem] = {}
    seen: set[bytes] = set()
    duplicates = 0
    for number, row in reader(path):
        if deduplicate:
            key = hashlib.blake2b(repr(row.get("prompt")).encode(), digest_size=16).digest()
            if key in seen:
                duplicates += 1
                continue
            seen.add(key)
        where = f"{path} {unit} {number}"
        prompt = _prompt(where, row)
        ground_truth = _ground_truth(where, row)
        text, prompt_ids = encode(where, prompt)
        extra = _mapping(where, row, "extra_info")
        name = str(number) if extra.get("index") is None else str(extra["index"])
        if name in problems:
            name = f"{name}@{number}"
        problems[name] = Problem(
            name, prompt_ids, text, ground_truth, str(row.get("data_source") or ""), extra
        )
    if not problems:
        raise UserError(f"{path} has no rows; give a file with at least one problem")
    if duplicates:
        log(f"{path}: dropped {duplicates:,} of {duplicates + len(problems):,} rows with a duplicate prompt")
    return list(problems.values())


def _prompt(where: str, row: dict[str, Any]) -> Prompt:
    prompt = row.get("prompt")
    if isinstance(prompt, str) and prompt:
        return prompt
    messages = prompt if isinstance(prompt, list) else []
    if not messages or not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages):
        raise UserError(
            f"{where} has no usable `prompt`; give a text or a list of messages with role and content"
        )
    return [(str(message.get("role") or "user"), message["content"]) for message in messages]


def _ground_truth(where: str, row: dict[str, Any]) -> str:
    answer = _mapping(where, row, "reward_model").get("ground_truth")
    if answer is None or str(answer) == "":
        raise UserError(f"{where} has no `reward_model.ground_truth`; give every row an answer")
    return str(answer)


def _mapping(where: str, row: dict[str, Any], key: str) -> dict[str, Any]:
    value = row.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{where} has a `{key}` that is not an object; write it as named fields")
    return value
