"""Prompts with responses to imitate, from rows: the data of supervised training.

prompt       response                           the row's columns
text         text                               {"question": "1+1", "solution": "2"}
messages     text, or the assistant's message   {"prompt": [{"role": "user", ...}], "completion": [{"role": "assistant", ...}]}
messages     the last message of the same       {"messages": [{"role": "user", ...}, {"role": "assistant", ...}]}
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_fipo.errors import UserError, listed
from megatron_fipo.tasks.dataset import digest
from megatron_fipo.tasks.located_rows import located_rows
from megatron_fipo.tasks.row import as_prompt, columns_advice, is_blank, value_of
from megatron_fipo.tasks.row_notes import NAMED_ROWS, report_forms
from megatron_fipo.tasks.row_reader import ROW_UNITS, Wanted
from megatron_fipo.tasks.task import EncodePrompt, Log, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResponseColumns:
    """The columns that are read. A dot names a field of an object."""

    prompt: str = "prompt"
    response: str = "response"


@dataclass(frozen=True)
class SupervisedRows:
    """Where the rows of a set are, and which of them are used."""

    path: str | None
    """None only for a function."""
    source: str
    """A format of `ROW_UNITS`, or the import path of a function."""
    columns: ResponseColumns
    max_length: int
    """Longest row in tokens, prompt and response together."""
    drop_overlong: bool

    @property
    def title(self) -> str:
        """The set in messages."""
        return self.path or self.source


@dataclass(frozen=True)
class Example:
    """A row in tokens."""

    name: str
    """Its place in the set."""
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    """With the end-of-sequence token."""

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class EncodeResponse:
    """Token ids of a response, followed by the end-of-sequence token of the tokenizer, on which engines stop."""

    tokenizer: "PreTrainedTokenizerBase"
    end_ids: frozenset[int]
    """All tokens on which engines stop."""

    def __call__(self, where: str, text: str) -> tuple[int, ...]:
        """Raises `UserError` that names `where` for a text with unknown characters, and with a token in it that ends a response."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids or self.tokenizer.unk_token_id in ids:
            raise UserError(
                f"{where} has a response with characters that the tokenizer lacks; use another tokenizer, or remove the row"
            )
        if inner := self.end_ids.intersection(ids):
            token = self.tokenizer.convert_ids_to_tokens(min(inner))
            raise UserError(
                f"{where} has a response that contains {token}, which ends a response; remove it, as it is added at the end"
            )
        return (*ids, self.tokenizer.eos_token_id)


def read_examples(
    rows: SupervisedRows, prompt: EncodePrompt, response: EncodeResponse, log: Log = logger.info
) -> list[Example]:
    """All rows of a set in their order, in tokens.

    `log` receives the number of rows and their mean lengths, those that are left out, and how prompts were read where a row
    leaves that open. Raises `UserError` that names the file if it cannot be read or has no usable row, the row and the column
    if it has no usable prompt or response, and the rows above `max_length` together unless they are dropped.
    """
    columns = rows.columns
    names = tuple(dict.fromkeys((columns.prompt, columns.response)))
    wanted = Wanted(names, {columns.response: "response", columns.prompt: "prompt"})
    examples: list[Example] = []
    long: list[tuple[str, int]] = []
    texts = messages = 0
    for located in located_rows(rows.path, rows.source, wanted):
        asked, answer = parse_example(located.where, located.values, columns)
        texts += isinstance(asked, str)
        messages += not isinstance(asked, str)
        _, prompt_ids = prompt(located.where, asked)
        example = Example(located.label, prompt_ids, response(located.where, answer))
        if example.length > rows.max_length:
            long.append((located.label, example.length))
        else:
            examples.append(example)
    _report_long(rows, long, texts + messages, log)
    if not examples:
        raise UserError(
            f"{rows.title} has no rows{' within data.max_length' if long else ''}; check the file"
        )
    report_forms(rows.title, texts, messages, prompt, log)
    lengths = [
        sum(len(part) for part in parts) / len(examples)
        for parts in zip(*((example.prompt_ids, example.response_ids) for example in examples), strict=True)
    ]
    log(
        f"{rows.title}: {len(examples):,} rows, on average {lengths[0]:.0f} tokens of prompt and {lengths[1]:.0f} of response"
    )
    return examples


def parse_example(
    where: str, row: Mapping[str, Any], columns: ResponseColumns = ResponseColumns()
) -> tuple[Prompt, str]:
    """Prompt and response of a row. Raises `UserError` that names `where` and the column if one of them is unusable."""
    for setting, name in (("prompt", columns.prompt), ("response", columns.response)):
        if name not in row and name.partition(".")[0] not in row:
            raise UserError(f"{where} has no `{name}`; {columns_advice(setting, list(row))}")
    prompt, _ = as_prompt(where, columns.prompt, value_of(where, row, columns.prompt, []))
    if columns.prompt == columns.response:
        if isinstance(prompt, str):
            raise UserError(
                f"{where} has a text as its `{columns.prompt}`, of which no part is the response; name another column as "
                "data.columns.response, or store messages"
            )
        prompt, response = prompt[:-1], _assistant(where, columns.response, prompt[-1])
        if not prompt:
            raise UserError(f"{where} has a `{columns.prompt}` of one message; write the prompt before it")
    else:
        value, _ = as_prompt(where, columns.response, value_of(where, row, columns.response, []))
        if not isinstance(value, str) and len(value) != 1:
            raise UserError(
                f"{where} has {len(value)} messages as its `{columns.response}`; if they are prompt and response together, set "
                f"data.columns.prompt={columns.response} too"
            )
        response = value if isinstance(value, str) else _assistant(where, columns.response, value[0])
    return prompt, response


def _assistant(where: str, key: str, message: tuple[str, str]) -> str:
    role, content = message
    if role != "assistant" or is_blank(content):
        fault = f"is of the role {role}" if role != "assistant" else "has no text"
        raise UserError(
            f"{where} has a `{key}` whose last message {fault}; end it with a message of the assistant"
        )
    return content


def _report_long(rows: SupervisedRows, long: Sequence[tuple[str, int]], total: int, log: Log) -> None:
    if not long:
        return
    labels = listed([label for label, _ in long[:NAMED_ROWS]], NAMED_ROWS, len(long))
    fact = (
        f"{rows.title}: {len(long):,} of {total:,} rows are above data.max_length={rows.max_length}, the longest with "
        f"{max(length for _, length in long)} tokens ({ROW_UNITS.get(rows.source, 'row')}s {labels})"
    )
    if not rows.drop_overlong:
        raise UserError(f"{fact}; raise it, remove these rows, or set data.overlong_rows=drop")
    log(f"{fact}; they are left out (data.overlong_rows=drop)")


def split_held_out(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Those to train on and those held out: a share of the different prompts, chosen by the seed, with all of their rows.

    Raises `UserError` if one of the two would be empty.
    """
    prompts = sorted(
        {example.prompt_ids for example in examples}, key=lambda ids: digest("held out", seed, ids)
    )
    count = round(share * len(prompts))
    if not 0 < count < len(prompts):
        raise UserError(
            f"data.held_out_share={share} of {len(prompts):,} different prompts is {count}; it must hold out at least one and "
            "leave one to train on"
        )
    chosen = set(prompts[:count])
    training = [example for example in examples if example.prompt_ids not in chosen]
    return training, [example for example in examples if example.prompt_ids in chosen]
