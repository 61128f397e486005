"""Problems from rows: of files, or of a function of the user's.

Rows are read as a stream, and a duplicate prompt is dropped before it is tokenized: the published training file of DAPO
repeats 17 thousand prompts about a hundred times.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_fipo.config import Config, EvaluationSet, TrainingSet
from megatron_fipo.errors import UserError
from megatron_fipo.tasks.dataset import digest
from megatron_fipo.tasks.located_rows import located_rows
from megatron_fipo.tasks.row import ColumnNames, parse_row
from megatron_fipo.tasks.row_notes import RowNotes
from megatron_fipo.tasks.row_reader import ROW_UNITS, wanted_of
from megatron_fipo.tasks.task import EncodePrompt, Log, Problem, PromptTooLongError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowSettings:
    """Where the rows of a set are, and how they are read."""

    path: str | None
    """None only for a function."""
    source: str
    """A format of `ROW_UNITS`, or the import path of a function."""
    names: ColumnNames = field(default_factory=ColumnNames)
    answer: str = "verbatim"
    overlong: str = "error"
    deduplicate: bool = True
    keep_columns: bool = False
    """Problems have all columns of their rows whose values are those of JSON."""

    @property
    def title(self) -> str:
        """The set in messages."""
        return self.path or self.source


def row_settings(
    config: Config, of_set: TrainingSet | EvaluationSet | None, keep_columns: bool = False
) -> RowSettings:
    """The settings of a set, or of `data.train_path` for None."""
    data = config.data
    columns = {**data.columns, **({} if of_set is None else of_set.columns)}
    return RowSettings(
        data.train_path if of_set is None else of_set.path,
        (of_set and of_set.source) or data.source,
        ColumnNames(**columns),
        (of_set and of_set.answer) or data.answer,
        data.overlong_prompts,
        data.deduplicate,
        keep_columns,
    )


def read_problems(settings: RowSettings, encode: EncodePrompt, log: Log = logger.info) -> list[Problem]:
    """All problems of a set, in the order of its rows.

    With `deduplicate`, only the first of the rows with the same prompt is used. A problem's id is that of its row, or the
    row's number if it has none, or both if the id is a repeated one. `log` receives the number of rows dropped, the rows
    with the same prompt and different answers, and how prompts were read where a row leaves that open. Raises `UserError`
    that names the file if it cannot be read, and the row or line if it has no usable prompt or answer; it names the rows with
    a prompt above the limit together.
    """
    problems: dict[str, Problem] = {}
    unit = ROW_UNITS.get(settings.source, "row")
    notes = RowNotes(settings.title, unit, log)
    different = 0
    wanted = wanted_of(settings.names, settings.keep_columns)
    for located in located_rows(settings.path, settings.source, wanted):
        row = parse_row(located.where, located.values, settings.names, settings.answer)
        repeats = notes.repeats(located.label, row)
        if repeats and settings.deduplicate:
            continue
        try:
            text, prompt_ids = encode(located.where, row.prompt)
        except PromptTooLongError as error:
            notes.too_long(located.label, error)
            if settings.overlong != "truncate_left":
                continue
            text, prompt_ids = encode.truncated(error.prompt_ids)
        different += not repeats
        name = str(located.number) if row.index is None else row.index
        while name in problems:
            name = f"{name}@{located.number}"
        content = digest(row.prompt, row.ground_truth, row.data_source, row.index).hex()
        columns = _json_columns(located.values, notes.left_out) if settings.keep_columns else {}
        problems[name] = Problem(name, prompt_ids, text, row.ground_truth, row.data_source, content, columns)
    notes.left_out |= wanted.left_out
    if settings.overlong == "error":
        notes.refuse_too_long()
    if not notes.rows:
        raise UserError(f"{settings.title} has no rows; check the file")
    notes.report(settings.deduplicate, settings.overlong, encode)
    if not problems:
        raise UserError(
            f"{settings.title}: every prompt is above rollout.max_prompt_length, so data.overlong_prompts=drop leaves none; "
            "raise the limit"
        )
    notes.report_equal_texts(different, problems.values())
    return list(problems.values())


def _json_columns(values: Mapping[str, Any], left_out: set[str]) -> dict[str, Any]:
    """The columns of a row whose values are those of JSON. The names of the others are added to `left_out`."""
    kept = {name: value for name, value in values.items() if _is_json(value)}
    if len(kept) < len(values):
        left_out.update(values.keys() - kept.keys())
    return kept


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_json(item) for name, item in value.items())
    if isinstance(value, list):
        return all(map(_is_json, value))
    return value is None or isinstance(value, (str, int, float))
