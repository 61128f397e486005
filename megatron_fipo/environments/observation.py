"""An environment's answer as token ids."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_fipo.errors import first_line, shown
from megatron_fipo.scorer.result import UnusableResultError

ASSISTANT = "The assistant's message."
"""A message of the assistant; what the chat template writes after it does not depend on it."""
Messages = list[dict[str, str]]


class ObservationEncoder:
    """Encodes observations, at most `limit` tokens each."""

    def __init__(self, tokenizer: Any, vocab_size: int, limit: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._limit = limit

    def __call__(self, observation: Any, last_token: int | None) -> tuple[NDArray[np.int32], bool]:
        """The token ids [tokens, at least 1], and whether the observation was cut.

        A text or a list of token ids loses its end; of messages the longest content loses its end, so that what the template
        writes around it stays. `last_token` is the last of the policy's turn: the template's end-of-turn token is not
        repeated after it. Raises `UnusableResultError` for what is no observation.
        """
        if isinstance(observation, str):
            return self._cut(self._encode(observation))
        if isinstance(observation, Sequence) and observation:
            if all(isinstance(item, Mapping) for item in observation):
                return self._encode_messages([_message(item) for item in observation], last_token)
            if all(type(item) is int and 0 <= item < self._vocab_size for item in observation):
                return self._cut(list(observation))
        raise UnusableResultError(
            f"returned {shown(observation)}, not a text, messages with role and content, token ids below "
            f"{self._vocab_size:,}, Done or None"
        )

    def _encode(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeError as error:
            raise UnusableResultError(f"returned {shown(text)}, not valid text") from error
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _cut(self, ids: list[int]) -> tuple[NDArray[np.int32], bool]:
        if not ids:
            raise UnusableResultError(
                "returned an observation without tokens; return None to end the episode"
            )
        return np.array(ids[: self._limit], np.int32), len(ids) > self._limit

    def _encode_messages(self, messages: Messages, last_token: int | None) -> tuple[NDArray[np.int32], bool]:
        truncated = False
        while True:
            ids = self._encode(self._after_assistant(messages))
            if ids and ids[0] == last_token:
                del ids[0]
            excess = len(ids) - self._limit
            if excess <= 0:
                return self._cut(ids)[0], truncated
            longest = max(messages, key=lambda message: len(message["content"]))
            content = self._encode(longest["content"])
            if not content:
                raise UnusableResultError(
                    f"returned messages that take {len(ids)} tokens without content, more than "
                    f"environment.max_observation_tokens = {self._limit}"
                )
            longest["content"] = self._tokenizer.decode(content[: max(0, len(content) - excess)])
            truncated = True

    def _after_assistant(self, messages: Messages) -> str:
        """What the chat template writes after a message of the assistant if these follow it."""
        before = [{"role": "user", "content": "."}, {"role": "assistant", "content": ASSISTANT}]
        if self._tokenizer.chat_template is None:
            raise UnusableResultError(
                "returned messages, but the tokenizer has no chat template; return a text"
            )
        try:
            text = self._tokenizer.apply_chat_template(
                before + messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template may raise anything
            raise UnusableResultError(
                f"returned messages that the chat template refuses ({first_line(error)})"
            ) from error
        _, found, after = text.partition(ASSISTANT)
        if not found:
            raise UnusableResultError(
                "returned messages, but the chat template does not write messages of the assistant"
            )
        return after


def _message(item: Mapping[str, Any]) -> dict[str, str]:
    if set(item) != {"role", "content"} or not all(isinstance(value, str) for value in item.values()):
        raise UnusableResultError(
            f"returned the message {shown(dict(item))}, not a role and a content as text"
        )
    return {"role": item["role"], "content": item["content"]}
