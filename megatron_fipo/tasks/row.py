"""One row of a data file as a prompt with its answer. Pure; every value is text, or an error names it.

Values are never turned into text by guessing: `34.0`, `['34']`, `b'34'` and `nan` as texts would make every
right answer wrong without a trace.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from decimal import Decimal
from typing import Any

from megatron_fipo.errors import UserError, listed, shown
from megatron_fipo.tasks import strict_json
from megatron_fipo.tasks.task import Prompt

LARGEST_WHOLE_FLOAT = 2**24
"""Above it, floats of 32 bits do not represent every whole number."""

MAX_ANSWER_CHARACTERS = 16 * 2**20
"""Of a ground truth: the unit tests of a problem may take megabytes. Rewards read it for every response."""

_MESSAGES_AS_TEXT = re.compile(
    r"""(?:array\()?\\?["']?\[?\s*\{(?=.*?\\?["'](?:role|from)\\?["']\s*:)(?=.*?\\?["'](?:content|value)\\?["']\s*:)""",
    re.DOTALL,
)
"""The start of messages that were turned into text, by JSON or by Python's `str`."""


@dataclass(frozen=True)
class ColumnNames:
    """The columns that are read. A dot names a field of an object."""

    prompt: str = "prompt"
    ground_truth: str = "reward_model.ground_truth"
    data_source: str = "data_source"
    id: str = "extra_info.index"

    @property
    def all(self) -> tuple[str, ...]:
        return astuple(self)


LIKELY_COLUMNS: Mapping[str, Sequence[str]] = {
    "prompt": (
        "prompt",
        "problem",
        "question",
        "query",
        "instruction",
        "input",
        "messages",
        "conversation",
        "text",
    ),
    "ground_truth": (
        "answer",
        "final_answer",
        "expected_answer",
        "ground_truth",
        "gold",
        "target",
        "label",
        "output",
        "solution",
    ),
    "response": (
        "response",
        "completion",
        "chosen",
        "messages",
        "conversations",
        "output",
        "answer",
        "solution",
    ),
}
"""What published files call the required columns, the likeliest first."""


@dataclass(frozen=True)
class Row:
    """The columns that are read."""

    prompt: Prompt
    prompt_was_json: bool
    """The prompt was stored as JSON text of messages."""
    json_columns: tuple[str, ...]
    """The columns whose objects were stored as JSON text."""
    ground_truth: str
    data_source: str
    """Empty if the row has none."""
    index: str | None
    """The id, if the row has one."""


def parse_row(
    where: str, row: Mapping[str, Any], names: ColumnNames = ColumnNames(), answer_form: str = "verbatim"
) -> Row:
    """The row in the columns `names`, with the answer taken out of its ground truth as `data.answer` states.

    Strings are taken as they are. A whole number is written as an integer, also a float: pandas makes floats
    of integers beside a gap. Raises `UserError` that names `where` and the key for every other value, for a
    blank prompt or answer, and for text that is not valid Unicode.
    """
    json_columns: list[str] = []
    if names.prompt not in row and names.prompt.partition(".")[0] not in row:
        raise UserError(f"{where} has no `{names.prompt}`; {columns_advice('prompt', list(row))}")
    prompt, was_json = as_prompt(where, names.prompt, value_of(where, row, names.prompt, json_columns))
    key = names.ground_truth
    answer = as_text(where, key, value_of(where, row, key, json_columns))
    if answer is None or is_blank(answer):
        raise UserError(
            f"{where} has no `{key}`; give every row an answer ({columns_advice('ground_truth', list(row))})"
        )
    if answer_form != "verbatim":
        answer = _extracted(where, key, answer, answer_form)
    if len(answer) > MAX_ANSWER_CHARACTERS:
        raise UserError(
            f"{where} has a `{key}` of {len(answer):,} characters; at most "
            f"{MAX_ANSWER_CHARACTERS:,} are read, so shorten it or remove the row"
        )
    return Row(
        prompt=prompt,
        prompt_was_json=was_json,
        ground_truth=answer,
        data_source=as_text(where, names.data_source, value_of(where, row, names.data_source, json_columns))
        or "",
        index=as_text(where, names.id, value_of(where, row, names.id, json_columns)),
        json_columns=tuple(json_columns),
    )


def columns_advice(setting: str, columns: Sequence[str], noun: str = "keys") -> str:
    """Which columns there are, and which of them the setting `data.columns.SETTING` should probably name."""
    by_name = {column.lower(): column for column in columns}
    likely = next((by_name[name] for name in LIKELY_COLUMNS[setting] if name in by_name), None)
    advice = "" if likely is None else f"; set data.columns.{setting}={likely} if that is it"
    return f"its {noun} are {named(columns) or 'none'}{advice}"


def named(names: Sequence[str]) -> str:
    """Names of columns or keys for a message, on one line."""
    return listed([name if name.isprintable() else ascii(name) for name in names], 12)


def _extracted(where: str, key: str, text: str, form: str) -> str:
    answer, mark = (last_boxed(text), r"\boxed{...}") if form == "boxed" else (_after_hashes(text), "####")
    if answer is None or is_blank(answer):
        raise UserError(
            f"{where} has a `{key}` without an answer in {mark} ({shown(text)}), which data.answer={form} reads; "
            "remove the row, or write the answer in a column of its own"
        )
    return answer


def _after_hashes(text: str) -> str | None:
    return text.rpartition("####")[2].strip() if "####" in text else None


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` of a text, whose braces may be nested; None if there is none that is complete."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    content = text[start + len(r"\boxed{") :]
    depth = 1
    for token in re.finditer(r"\\.|[{}]", content, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return content[: token.start()].strip()
    return None


def as_prompt(where: str, key: str, value: Any) -> tuple[Prompt, bool]:
    """The value as a prompt, and whether it was JSON text of messages. Raises `UserError` that names `where` and `key`."""
    if isinstance(value, list):
        return _messages(where, key, value), False
    if isinstance(value, str) and not is_blank(value):
        text = as_text(where, key, value) or ""
        if not _MESSAGES_AS_TEXT.match(text.strip()):
            return text, False
        try:
            stored = strict_json.loads(text)
        except ValueError:
            stored = None
        if not isinstance(stored, list):
            raise UserError(
                f"{where} has a `{key}` that looks like messages written as text ({shown(text)}); store a "
                "list of messages with role and content, or their JSON"
            )
        return _messages(where, key, stored), True
    raise UserError(
        f"{where} has no usable `{key}` but {shown(value)}; give a text or a list of messages with role and "
        "content"
    )


def _messages(where: str, key: str, values: list[Any]) -> Prompt:
    messages = []
    for value in values:
        if not isinstance(value, dict) or not all(isinstance(value.get(k), str) for k in ("role", "content")):
            raise UserError(
                f"{where} has no usable `{key}`: its message {shown(value)} needs role and content as text"
            )
        messages.append((as_text(where, "role", value["role"]), as_text(where, "content", value["content"])))
    if all(is_blank(content or "") for _, content in messages):
        raise UserError(f"{where} has no usable `{key}`: its messages have no text; give them content")
    return tuple(messages)  # type: ignore[arg-type]


def is_blank(text: str) -> bool:
    """Whether a text has no visible character."""
    return all(character.isspace() or unicodedata.category(character) == "Cf" for character in text)


def value_of(where: str, row: Mapping[str, Any], name: str, json_columns: list[str]) -> Any:
    """What a row has under a column, or under a field of an object; None if there is none.

    The names of objects that are stored as JSON text are added to `json_columns`.
    """
    if name in row:
        return row[name]
    value: Any = row
    parts = name.split(".")
    for number, part in enumerate(parts):
        if number:
            key = ".".join(parts[:number])
            if isinstance(value, str) and (stored := _json_object(value)) is not None:
                value = stored
                json_columns.append(key)
            if not isinstance(value, dict):
                raise UserError(
                    f"{where} has a `{key}` that is not an object but {shown(value)}; write it as named fields"
                )
        value = value.get(part)
        if value is None:
            return None
    return value


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = strict_json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def as_text(where: str, key: str, value: Any) -> str | None:
    """The value as text; None if it is absent. Raises `UserError` that names `where` and `key` as `parse_row`."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where} has a `{key}` that is not valid Unicode (a lone surrogate at character "
                f"{error.start + 1}); fix the text"
            ) from error
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, Decimal) and value.is_finite() and value == int(value):
        return str(int(value))
    if isinstance(value, float) and value.is_integer() and abs(value) <= LARGEST_WHOLE_FLOAT:
        return str(int(value))
    raise UserError(
        f"{where} has a `{key}` that is neither text nor a whole number but {shown(value)}; write it as text"
    )
