"""The text of a response, or only its end: a reward that reads the end needs no more decoded."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_fipo.tasks.task import Turn

MARGIN = 16
"""Characters at the front of a decoded tail that are not used: it may begin within a character of up to 4 bytes,
and decoders treat the first token differently, for example without its space."""
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
"""A token that stands for one byte, in vocabularies with byte fallback."""


class ResponseText:
    """Token ids to text without special tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._byte_ids = frozenset(
            index for token, index in tokenizer.get_vocab().items() if _BYTE_TOKEN.fullmatch(str(token))
        )
        # Removing spaces before punctuation works through the complete text from its start, and tokenizers
        # in Python may do anything.
        self._local = tokenizer.is_fast and not tokenizer.clean_up_tokenization_spaces

    def __call__(self, token_ids: Sequence[int] | np.ndarray) -> str:
        """The complete text."""
        return self._tokenizer.decode(np.asarray(token_ids).tolist(), skip_special_tokens=True)

    def ending(self, token_ids: Sequence[int] | np.ndarray, characters: int | None) -> str:
        """The last `characters` characters of the text of `token_ids` (None: all of it).

        Decodes a tail of tokens, twice as long each time until it has enough characters.
        """
        if characters is None:
            return self(token_ids)
        count = characters
        while self._local and (start := self._boundary(token_ids, len(token_ids) - count)) > 0:
            text = self(token_ids[start:])
            if len(text) >= characters + MARGIN:
                return text[-characters:]
            count *= 2
        return self(token_ids)[-characters:]

    def _boundary(self, token_ids: Sequence[int] | np.ndarray, start: int) -> int:
        """The last position up to `start` that is not within a run of byte tokens; at most 0 if there is none.

        Such a run is decoded as one: if a byte in it is wrong, all are replaced. A token without text, which
        is special and skipped, does not end it.
        """
        while start > 0 and (token_ids[start] in self._byte_ids or not self([token_ids[start]])):
            start -= 1
        return start


def turns_of(
    text: ResponseText, token_ids: np.ndarray, observations: Sequence[tuple[int, int]]
) -> tuple[Turn, ...]:
    """The turns of a response: `observations` are the ranges (start, end) of `token_ids` that an environment gave, rising."""
    turns, start = [], 0
    for begin, end in observations:
        turns.append(Turn(text(token_ids[start:begin]), text(token_ids[begin:end])))
        start = end
    return (*turns, Turn(text(token_ids[start:]), ""))
