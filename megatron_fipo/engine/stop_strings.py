"""Where a stop string ends a response, counted in tokens. No torch, no vLLM."""

from collections.abc import Callable, Sequence
from typing import Any

Decode = Callable[[Sequence[int]], str]
"""The text of token ids, special tokens included."""
REPLACEMENT = "\ufffd"
"""What an incomplete character is decoded as."""


class StopStrings:
    """Finds the token whose text completes one of the strings.

    A token has at least one byte of text. So a string of n bytes lies in the last n tokens, and only these are decoded. A few
    more are, because a character of several bytes may have tokens before them.
    """

    def __init__(self, stop: Sequence[str], decode: Decode) -> None:
        self._stop = tuple(stop)
        self._decode = decode
        self._window = max(len(text.encode()) for text in stop) + 3

    def ends(self, prefix: Sequence[int], tokens: Sequence[int]) -> bool:
        """Whether the last of `tokens`, which follow `prefix` in the response, completes a string.

        The prefix may contain complete ones, which ended earlier turns.
        """
        tail = list(tokens[-self._window :])
        if missing := self._window - len(tail):
            tail = [*prefix[-missing:], *tail]
        # the last token may complete a character of which `before` has a part
        before = self._decode(tail[:-1]).rstrip(REPLACEMENT)
        text = self._decode(tail)
        return any(text.find(string, max(0, len(before) - len(string) + 1)) >= 0 for string in self._stop)

    def end_across(self, prefix: Sequence[int], tokens: Sequence[int]) -> int | None:
        """The number of `tokens` up to the one that completes a string which begins in `prefix`; None if there is none.

        For engines that find strings in `tokens` themselves: only the first of them are looked at.
        """
        counts = range(1, min(self._window, len(tokens)) + 1) if len(prefix) else range(0)
        return next((count for count in counts if self.ends(prefix, tokens[:count])), None)


def decoder(model_path: str, trust_remote_code: bool) -> Decode:
    """Of the tokenizer in a model folder. Raises the errors of `load_tokenizer`."""
    from megatron_fipo.checkpoint.tokenizer import load_tokenizer
    from megatron_fipo.families.registry import read_architecture

    tokenizer: Any
    tokenizer, _ = load_tokenizer(model_path, trust_remote_code, read_architecture(model_path).vocab_size)
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
