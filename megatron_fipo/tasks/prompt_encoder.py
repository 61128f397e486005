"""A prompt to text and token ids."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jinja2

from megatron_fipo.errors import UserError
from megatron_fipo.tasks.task import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PromptEncoder:
    """Converts a prompt to text and token ids, at most `max_prompt_length` tokens."""

    tokenizer: "PreTrainedTokenizerBase"
    max_prompt_length: int

    def __call__(self, where: str, prompt: Prompt) -> tuple[str, tuple[int, ...]]:
        """The prompt's text, and its token ids.

        Messages are formatted by the tokenizer's chat template; without one their contents are joined by
        newlines. A template adds its own special tokens; other texts get those that the tokenizer adds by
        default. Raises `UserError` that names `where` for a prompt without tokens, above the limit, or
        refused by the template.
        """
        templated = not isinstance(prompt, str) and self.tokenizer.chat_template is not None
        if isinstance(prompt, str):
            text = prompt
        elif templated:
            text = self._apply_template(where, prompt)
        else:
            text = "\n".join(content for _, content in prompt)
        prompt_ids = tuple(self.tokenizer(text, add_special_tokens=not templated)["input_ids"])
        if not prompt_ids:
            raise UserError(f"{where} has a prompt without tokens; give it text")
        if len(prompt_ids) > self.max_prompt_length:
            raise UserError(
                f"{where} has a prompt of {len(prompt_ids)} tokens, above rollout.max_prompt_length = "
                f"{self.max_prompt_length}; raise the limit or remove the prompt"
            )
        return text, prompt_ids

    def _apply_template(self, where: str, prompt: list[tuple[str, str]]) -> str:
        messages = [{"role": role, "content": content} for role, content in prompt]
        try:
            return str(
                self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            )
        except jinja2.TemplateError as error:
            raise UserError(
                f"{where}: the chat template refuses the prompt ({error}); fix its roles"
            ) from error
