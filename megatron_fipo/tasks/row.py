"""One row of a data file as a prompt with its answer. Pure; every value is text, or an error names it.

Values are never turned into text by guessing: `34.0`, `['34']`, `b'34'` and `nan` as texts would make every
right answer wrong without a trace.
"""

import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from megatron_fipo.errors import UserError
from megatron_fipo.tasks import strict_json
from megatron_fipo.tasks.row_reader import named
from megatron_fipo.tasks.task import Prompt

LARGEST_WHOLE_FLOAT = 2**24
"""Above it, floats of 32 bits do not represent every whole number."""

_MESSAGES_AS_TEXT = re.compile(
    r"""(?:array\()?\\?["']?\[?\s*\{(?=.*?\\?["'](?:role|from)\\?["']\s*:)(?=.*?\\?["'](?:content|value)\\?["']\s*:)""",
    re.DOTALL,
)
"""The start of messages that were turned into text, by JSON or by Python's `str`."""


@dataclass(frozen=True)
class Row:
    """The columns that are read."""

    prompt: Prompt
    prompt_was_json: bool
    """The prompt was stored as JSON text of messages."""
    ground_truth: str
    data_source: str
    """Empty if the row has none."""
    index: str | None
    """`extra_info.index`."""


def parse_row(where: str, row: dict[str, Any]) -> Row:
    """The row in the columns `prompt`, `reward_model.ground_truth`, `data_source`, `extra_info.index`.

    Strings are taken as they are. A whole number is written as an integer, also a float: pandas makes floats
    of integers beside a gap. Raises `UserError` that names `where` and the key for every other value, for a
    blank prompt or answer, and for text that is not valid Unicode.
    """
    if "prompt" not in row:
        raise UserError(f"{where} has no `prompt`; its keys are {named(list(row)) or 'none'}")
    prompt, was_json = _prompt(where, row["prompt"])
    answer = _text(
        where, "reward_model.ground_truth", _section(where, row, "reward_model").get("ground_truth")
    )
    if answer is None or is_blank(answer):
        raise UserError(
            f"{where} has no `reward_model.ground_truth`; give every row an answer (its keys are "
            f"{named(list(row))})"
        )
    return Row(
        prompt=prompt,
        prompt_was_json=was_json,
        ground_truth=answer,
        data_source=_text(where, "data_source", row.get("data_source")) or "",
        index=_text(where, "extra_info.index", _section(where, row, "extra_info").get("index")),
    )


def _prompt(where: str, value: Any) -> tuple[Prompt, bool]:
    """The prompt, and whether it was JSON text of messages."""
    if isinstance(value, list):
        return _messages(where, value), False
    if isinstance(value, str) and not is_blank(value):
        text = _text(where, "prompt", value) or ""
        if not _MESSAGES_AS_TEXT.match(text.strip()):
            return text, False
        try:
            stored = strict_json.loads(text)
        except ValueError:
            stored = None
        if not isinstance(stored, list):
            raise UserError(
                f"{where} has a `prompt` that looks like messages written as text ({_shown(text)}); store a "
                "list of messages with role and content, or their JSON"
            )
        return _messages(where, stored), True
    raise UserError(
        f"{where} has no usable `prompt` but {_shown(value)}; give a text or a list of messages with role and "
        "content"
    )


def _messages(where: str, values: list[Any]) -> Prompt:
    messages = []
    for value in values:
        if not isinstance(value, dict) or not all(isinstance(value.get(k), str) for k in ("role", "content")):
            raise UserError(
                f"{where} has no usable `prompt`: its message {_shown(value)} needs role and content as text"
            )
        messages.append((_text(where, "role", value["role"]), _text(where, "content", value["content"])))
    if all(is_blank(content or "") for _, content in messages):
        raise UserError(f"{where} has no usable `prompt`: its messages have no text; give them content")
    return tuple(messages)  # type: ignore[arg-type]


def is_blank(text: str) -> bool:
    """Whether a text has no visible character."""
    return all(character.isspace() or unicodedata.category(character) == "Cf" for character in text)


def _section(where: str, row: dict[str, Any], key: str) -> dict[str, Any]:
    """The object under `key`; empty if there is none."""
    value = row.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(
            f"{where} has a `{key}` that is not an object but {_shown(value)}; write it as named fields"
        )
    return value


def _text(where: str, key: str, value: Any) -> str | None:
    """The value as text; None if it is absent."""
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
        f"{where} has a `{key}` that is neither text nor a whole number but {_shown(value)}; write it as text"
    )


def _shown(value: Any) -> str:
    """A value for a message, with its type, in at most about 60 characters of ASCII."""
    text = ascii(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
