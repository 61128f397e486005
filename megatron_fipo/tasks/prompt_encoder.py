"""A prompt to text and token ids."""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from megatron_fipo.errors import UserError, first_line
from megatron_fipo.tasks.row import is_blank
from megatron_fipo.tasks.task import Prompt, PromptTooLongError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TIME_CALL = re.compile(
    r"""strftime_now\s*\(\s*(?:format\s*=\s*)?("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')\s*\)"""
)
_OTHER_TIME = re.compile(r"strftime_now(?!\s+is\s+(?:not\s+)?defined)")
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)


@dataclass(frozen=True)
class PromptEncoder:
    """Converts a prompt to text and token ids, at most `max_prompt_length` tokens."""

    tokenizer: "PreTrainedTokenizerBase"
    max_prompt_length: int
    now: datetime
    """The time that a chat template may print (Llama 3.1's prints the date), fixed so that a resumed run has
    the same prompts."""
    system_prompt: str | None = None
    """System message of messages that have none."""
    wraps_texts: bool = False
    """A plain text becomes a message of the user."""
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further values that the chat template reads."""
    _shared: dict[int, int] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Each token id once: with an int object for every token, prompts would take four times the memory."""

    @property
    def has_chat_template(self) -> bool:
        return self.tokenizer.chat_template is not None

    def __call__(self, where: str, prompt: Prompt) -> tuple[str, tuple[int, ...]]:
        """The prompt's text, and its token ids.

        Messages are formatted by the tokenizer's chat template, which adds its own special tokens; other
        texts get those that the tokenizer adds by default. Without a template a single message of the user
        is its content. Raises `UserError` that names `where` for other messages without a template, for a text if there
        is a system prompt and texts are not wrapped, and for a prompt without tokens or refused by the template, and
        `PromptTooLongError` for one above the limit.
        """
        prompt = self._complete(where, prompt)
        if isinstance(prompt, str):
            text, templated = prompt, False
        elif self.has_chat_template:
            text, templated = self._apply_template(where, prompt), True
        else:
            text, templated = _only_content(where, prompt), False
        if is_blank(text):
            raise UserError(f"{where}: the chat template makes a blank text of the prompt; fix the template")
        ids = self.tokenizer(text, add_special_tokens=not templated)["input_ids"]
        prompt_ids = tuple(map(self._shared.setdefault, ids, ids))
        if not prompt_ids:
            raise UserError(f"{where} has a prompt without tokens; give it text")
        if len(prompt_ids) > self.max_prompt_length:
            raise PromptTooLongError(where, prompt_ids, self.max_prompt_length)
        return text, prompt_ids

    def truncated(self, prompt_ids: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        """The last tokens of a prompt above the limit, as many as are allowed, and their text."""
        last = prompt_ids[-self.max_prompt_length :]
        return str(self.tokenizer.decode(list(last))), last

    def _complete(self, where: str, prompt: Prompt) -> Prompt:
        """The prompt as messages if texts are wrapped, with the system prompt."""
        if isinstance(prompt, str) and self.wraps_texts:
            prompt = (("user", prompt),)
        if self.system_prompt is None:
            return prompt
        if isinstance(prompt, str):
            raise UserError(
                f"{where} has a plain text as its prompt, to which data.system_prompt cannot be added; set "
                "data.text_prompts=user_message, or remove the system prompt"
            )
        has_one = any(role == "system" for role, _ in prompt)
        return prompt if has_one else (("system", self.system_prompt), *prompt)

    def _apply_template(self, where: str, prompt: tuple[tuple[str, str], ...]) -> str:
        messages = [{"role": role, "content": content} for role, content in prompt]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=True,
                    chat_template=with_fixed_time(self.tokenizer.get_chat_template(), self.now),
                    **self.template_arguments,
                )
            )
        except Exception as error:  # a template may raise anything, by itself or by a wrong operation
            raise UserError(
                f"{where}: the chat template refuses the prompt ({first_line(error)}); fix its roles or the "
                "template"
            ) from error


def with_fixed_time(template: str, now: datetime) -> str:
    """A chat template with its calls of `strftime_now` replaced by their result at `now`.

    transformers gives templates the current time and no other. Raises `ValueError` for a call whose format is
    not a constant.
    """
    fixed = _TIME_CALL.sub(lambda call: repr(now.strftime(ast.literal_eval(call[1]))), template)
    if _OTHER_TIME.search(_COMMENT.sub("", fixed)):
        raise ValueError("it prints the time in a format that is not a constant text")
    return fixed


def _only_content(where: str, prompt: tuple[tuple[str, str], ...]) -> str:
    roles = [role for role, _ in prompt]
    if roles != ["user"]:
        raise UserError(
            f"{where} has messages of the roles {', '.join(roles)}, but the tokenizer has no chat template that "
            "gives them a form; write the prompt as one text, or add chat_template.jinja to the model folder"
        )
    return prompt[0][1]
