"""The forms in which published files hold a problem with its answer. Pure: one row in, one problem out.

form      columns                                                          files
DAPO      prompt, reward_model.ground_truth, extra_info.index              BytedTsinghua-SIA's, in DAPO's template
plain     problem or question, answer (also capitalized), id if there is   HuggingFaceH4, Maxwell-Jia, opencompass,
                                                                           math-ai, yentinglin, MathArena
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_fipo.errors import UserError
from megatron_fipo.tasks.row import ColumnNames, as_text, is_blank, named, parse_row
from megatron_fipo.tasks.row_reader import Wanted

TEMPLATE_HEAD = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
TEMPLATE_TAIL = '\n\nRemember to put your answer on its own line after "Answer:".'
"""DAPO's prompt is the problem between these two; its reward reads the line that they ask for."""

_AIME_ANSWER = re.compile(r"\$?\s*([0-9]{1,3})\s*(?:\^\s*\{?\\circ\}?|\\degree|°)?\s*\$?", re.ASCII)
_PROBLEM_COLUMNS = ("problem", "question", "Problem", "Question")
_ANSWER_COLUMNS = ("answer", "Answer")
_ID_COLUMNS = ("id", "ID", "problem_idx")


@dataclass(frozen=True)
class PublishedProblem:
    prompt: str
    """The text of the user's one message, in DAPO's template."""
    answer: str
    index: str | None
    """The file's own name of the problem."""


@dataclass(frozen=True)
class Form:
    """How to read the rows of a file."""

    columns: Sequence[str]
    """Those that are read; a dot names a field of an object."""
    read: Callable[[str, dict[str, Any]], PublishedProblem]
    """Raises `UserError`, which begins with the first argument, for a row that is no problem with an answer."""

    @property
    def wanted(self) -> Wanted:
        """What is read of a file of this form."""
        return Wanted(self.columns)

    @property
    def content(self) -> list[str]:
        """The columns that decide what the row is; ids and sources do not."""
        columns = dict.fromkeys(name.partition(".")[0] for name in self.columns)
        return [name for name in columns if name not in ("extra_info", "data_source")]


def form_of(where: str, columns: Sequence[str]) -> Form:
    """The form of a file with these columns. Raises `UserError` that names them if it is none of the known ones."""
    if {"prompt", "reward_model"} <= set(columns):
        return Form(ColumnNames().all, _read_dapo)
    problem, answer, index = (
        next((name for name in known if name in columns), None)
        for known in (_PROBLEM_COLUMNS, _ANSWER_COLUMNS, _ID_COLUMNS)
    )
    if problem is None or answer is None:
        raise UserError(
            f"{where} has the columns {named(columns)}, but a published file has prompt and reward_model, or "
            "problem (or question) and answer"
        )

    def read(where: str, row: dict[str, Any]) -> PublishedProblem:
        text, result = (as_text(where, key, row.get(key)) for key in (problem, answer))
        for key, value in ((problem, text), (answer, result)):
            if value is None or is_blank(value):
                raise UserError(f"{where} has no `{key}`")
        name = None if index is None else as_text(where, index, row.get(index))
        return PublishedProblem(f"{TEMPLATE_HEAD}{(text or '').strip()}{TEMPLATE_TAIL}", result or "", name)

    return Form([name for name in (problem, answer, index) if name], read)


def _read_dapo(where: str, values: dict[str, Any]) -> PublishedProblem:
    row = parse_row(where, values)
    messages = row.prompt if isinstance(row.prompt, tuple) else (("user", row.prompt),)
    role, text = messages[0]
    if len(messages) > 1 or role != "user":
        raise UserError(f"{where} has a `prompt` that is not one message of the user")
    if not (text.startswith(TEMPLATE_HEAD) and text.endswith(TEMPLATE_TAIL)):
        raise UserError(f"{where} has a `prompt` that is not in DAPO's template")
    return PublishedProblem(text, row.ground_truth, row.index)


def aime_answer(text: str) -> str | None:
    """The integer from 0 to 999 that an answer to an AIME problem is, in its shortest form; None if it is none.

    Accepts zeros at the front, dollar signs around it and a degree sign after it: `073`, `$73$`, `336^\\circ`.
    """
    match = _AIME_ANSWER.fullmatch(text.strip())
    return None if match is None else str(int(match[1]))
