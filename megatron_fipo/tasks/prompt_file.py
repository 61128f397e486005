"""The data sources `parquet` and `jsonl`: problems from a file with one problem per row.

Columns: `prompt`, `reward_model.ground_truth`, `data_source`, `extra_info.index`. Files are read as a stream,
and a duplicate prompt is dropped before it is tokenized: the published training file of DAPO repeats 17
thousand prompts about a hundred times.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from megatron_fipo.config import DataConfig
from megatron_fipo.errors import UserError, listed
from megatron_fipo.tasks.dataset import digest
from megatron_fipo.tasks.row import Row, parse_row
from megatron_fipo.tasks.row_reader import ROW_UNITS, read_rows
from megatron_fipo.tasks.task import EncodePrompt, Log, Problem, PromptTooLongError

logger = logging.getLogger(__name__)

NAMED_ROWS = 5
"""Rows that a message names; it counts the others."""


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

    With `deduplicate`, only the first of the rows with the same prompt is used. A problem's id is its
    `extra_info.index`, or its row number if it has none, or both if the index is a repeated one. `log`
    receives the number of rows dropped, the rows with the same prompt and different answers, and how prompts
    were read where a file leaves that open. Raises `UserError` that names the file if it cannot be read, and
    the row or line if it has no usable prompt or answer; it names the rows with a prompt above the limit
    together.
    """
    unit = ROW_UNITS[file_format]
    problems: dict[str, Problem] = {}
    notes = _Notes(path, unit)
    for number, values in read_rows(path, file_format):
        where = f"{path} {unit} {number}"
        row = parse_row(where, values)
        if notes.repeats(number, row) and deduplicate:
            continue
        try:
            text, prompt_ids = encode(where, row.prompt)
        except PromptTooLongError as error:
            notes.too_long[number] = error
            continue
        name = str(number) if row.index is None else row.index
        while name in problems:
            name = f"{name}@{number}"
        content = digest(row.prompt, row.ground_truth, row.data_source, row.index).hex()
        problems[name] = Problem(name, prompt_ids, text, row.ground_truth, row.data_source, content)
    notes.refuse_too_long()
    if not problems:
        raise UserError(f"{path} has no rows; give a file with at least one problem")
    notes.report(log, deduplicate, encode.has_chat_template)
    same = len(notes.first) - len({problem.prompt_text for problem in problems.values()})
    if same > 0:
        log(
            f"{path}: {same:,} of {len(notes.first):,} different prompts have the formatted text of another one; check "
            "the chat template"
        )
    return list(problems.values())


@dataclass
class _Notes:
    """What to report about the rows of a file once it has been read."""

    path: Path
    unit: str
    first: dict[bytes, tuple[int, str]] = field(default_factory=dict)
    """Number and answer of the first row with each prompt, by the prompt's digest."""
    rows: int = 0
    as_messages: int = 0
    """Rows whose prompt is a list of messages."""
    as_json: int = 0
    """Rows whose prompt is JSON text of messages."""
    repeated: int = 0
    contradictions: int = 0
    """Rows whose answer differs from that of the first row with the same prompt."""
    contradicting: list[str] = field(default_factory=list)
    """The first of them, for the message."""
    too_long: dict[int, PromptTooLongError] = field(default_factory=dict)
    """By row number."""

    def repeats(self, number: int, row: Row) -> bool:
        """Count the row; whether an earlier row has the same prompt."""
        self.rows += 1
        self.as_messages += not isinstance(row.prompt, str)
        self.as_json += row.prompt_was_json
        key = digest(row.prompt)
        if key not in self.first:
            self.first[key] = (number, row.ground_truth)
            return False
        self.repeated += 1
        first, answer = self.first[key]
        if answer != row.ground_truth:
            self.contradictions += 1
            if self.contradictions <= NAMED_ROWS:
                self.contradicting.append(f"{first} ({answer!r:.40}) and {number} ({row.ground_truth!r:.40})")
        return True

    def refuse_too_long(self) -> None:
        """Raise `UserError` that names the rows with a prompt above the limit, if there are any."""
        errors = list(self.too_long.values())
        if len(errors) == 1:
            raise errors[0]
        if errors:
            longest = max(error.tokens for error in errors)
            raise UserError(
                f"{self.path}: {len(errors):,} of {self.rows:,} rows have a prompt above rollout.max_prompt_length, "
                f"the longest with {longest} tokens ({self.unit}s {listed(list(map(str, self.too_long)), NAMED_ROWS)}); "
                "raise the limit or remove these rows"
            )

    def report(self, log: Log, deduplicate: bool, has_chat_template: bool) -> None:
        """One sentence for each thing that a user should know of the file."""
        if deduplicate and self.repeated:
            log(f"{self.path}: dropped {self.repeated:,} of {self.rows:,} rows with a duplicate prompt")
        if self.contradictions:
            used = "the first answer is used" if deduplicate else "all are used"
            log(
                f"{self.path}: rows with the same prompt have different answers, {used}: {self.unit}s "
                f"{listed(self.contradicting, NAMED_ROWS, self.contradictions)}; correct the file if that is not intended"
            )
        if self.as_json:
            log(f"{self.path}: {self.as_json:,} prompts are JSON text of messages and are read as messages")
        if self.as_messages and not has_chat_template:
            log(
                f"{self.path}: the tokenizer has no chat template, so the {self.as_messages:,} prompts stored as a "
                "message of the user are its content alone"
            )
