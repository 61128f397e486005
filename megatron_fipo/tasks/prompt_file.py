"""Problems from files of rows: `prompt`, `reward_model.ground_truth`, `data_source`, `extra_info.index`.

Files are read as a stream, and a repeated prompt is dropped before it is tokenised: the published training file of DAPO repeats
17 thousand prompts about a hundred times.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pyarrow
import pyarrow.parquet
from transformers import PreTrainedTokenizerBase

from megatron_fipo.errors import UserError, first_line
from megatron_fipo.tasks.problem import Problem

logger = logging.getLogger(__name__)

COLUMNS = ("prompt", "reward_model", "data_source", "extra_info")
ROWS_AT_ONCE = 4096

Prompt = str | list[tuple[str, str]]
"""A text that is used as it stands, or (role, content) messages."""


@contextmanager
def _access_errors(path: Path) -> Iterator[None]:
    """What the operating system refuses (permission, a failing disk), as a sentence. pyarrow's own OSErrors have no number."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise UserError(
            f"cannot read {path} ({os.strerror(error.errno)}); check its permissions and its disk"
        ) from error


def parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (row number from 0, row) of a parquet file, a few thousand rows in memory at a time."""
    number = 0
    try:
        with _access_errors(path), pyarrow.parquet.ParquetFile(path) as file:
            columns = [name for name in COLUMNS if name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=columns):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # a damaged page raises any of the three
        fault = f"cannot be read from row {number} on" if number else "is not a readable parquet file"
        raise UserError(f"{path} {fault} ({first_line(error)}); check data.source and the file") from error


def jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, row) for each line of a JSON lines file that is not blank."""
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
                    f"{path} line {number} is not JSON ({error.msg}, column {error.colno}); mend the line"
                ) from error
            except (
                ValueError,
                RecursionError,
            ) as error:  # a number of thousands of digits, thousands of brackets
                raise UserError(
                    f"{path} line {number} is beyond what can be read ({error}); mend the line"
                ) from error
            if not isinstance(row, dict):
                raise UserError(f"{path} line {number} is not a JSON object; write one object per line")
            yield number, row


READERS: dict[str, tuple[str, Callable[[Path], Iterator[tuple[int, dict[str, Any]]]]]] = {
    "parquet": ("row", parquet_rows),
    "jsonl": ("line", jsonl_rows),
}


@dataclass(frozen=True)
class PromptEncoder:
    """Turns a prompt into text and token ids, within `max_prompt_length` tokens."""

    tokenizer: PreTrainedTokenizerBase
    max_prompt_length: int

    def __call__(self, where: str, prompt: Prompt) -> tuple[str, tuple[int, ...]]:
        """Messages go through the tokenizer's chat template, or are joined by newlines where it has none.

        A template brings its own special tokens; other texts get those that the tokenizer adds by itself.
        UserError names `where` for a prompt without tokens or above the limit.
        """
        templated = not isinstance(prompt, str) and self.tokenizer.chat_template is not None
        if isinstance(prompt, str):
            text = prompt
        elif templated:
            text = self._apply_template(where, prompt)
        else:
            text = "\n".join(content for _, content in prompt)
        prompt_ids = tuple(self.tokenizer(text, add_special_tokens=not templated)["input_ids"])
        if not prompt_ids:
            raise UserError(f"{where} has a prompt without tokens; give it text")
        if len(prompt_ids) > self.max_prompt_length:
            raise UserError(
                f"{where} has a prompt of {len(prompt_ids)} tokens, above rollout.max_prompt_length = {self.max_prompt_length}; "
                "raise the limit or remove the prompt"
            )
        return text, prompt_ids

    def _apply_template(self, where: str, prompt: list[tuple[str, str]]) -> str:
        messages = [{"role": role, "content": content} for role, content in prompt]
        try:
            return str(
                self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            )
        except jinja2.TemplateError as error:
            raise UserError(
                f"{where}: the chat template refuses the prompt ({error}); mend its roles"
            ) from error


def read_problems(
    path: Path,
    source: str,
    encode: PromptEncoder,
    deduplicate: bool,
    say: Callable[[str], None] = logger.info,
) -> list[Problem]:
    """All problems of a file, in file order. With `deduplicate`, the first of rows with the same prompt; `say` is told how many went.

    A problem is called by its `extra_info.index`, or its row number where it has none, or both where an index comes again.
    UserError names a file that can't be read, and the row or line without a prompt or an answer, or with a prompt above the limit.
    """
    with _access_errors(path):
        if not path.is_file():
            raise UserError(
                f"the data file {path} does not exist; check data.train_path and data.evaluation_path"
            )
    unit, reader = READERS[source]
    problems: dict[str, Problem] = {}
    seen: set[bytes] = set()
    repeated = 0
    for number, row in reader(path):
        if deduplicate:
            key = hashlib.blake2b(repr(row.get("prompt")).encode(), digest_size=16).digest()
            if key in seen:
                repeated += 1
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
    if repeated:
        say(f"{path}: left out {repeated:,} of {repeated + len(problems):,} rows whose prompt came before")
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
        raise UserError(f"{where} has a `{key}` that is no object; write it as named fields")
    return value
