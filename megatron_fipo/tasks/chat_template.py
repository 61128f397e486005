"""The names that a chat template reads."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_fipo.errors import UserError, listed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
GIVEN = frozenset(
    {"messages", "add_generation_prompt", "raise_exception", "strftime_now"}
    | {f"{token}_token" for token in _SPECIAL}
)
"""What transformers or the encoder of prompts gives a template."""
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
"""Marks of transformers' own for the parts that an assistant wrote."""


def check_template_arguments(tokenizer: "PreTrainedTokenizerBase", arguments: Mapping[str, Any]) -> None:
    """Raise `UserError` for a name of `data.chat_template_arguments` that the tokenizer's chat template does not read."""
    if not arguments:
        return
    key = "data.chat_template_arguments"
    if tokenizer.chat_template is None:
        raise UserError(
            f"{key} has {listed(list(arguments), 8)}, but the tokenizer has no chat template; remove it"
        )
    names = template_names(tokenizer.get_chat_template())
    if names is None:
        return  # the template does not parse: the first prompt that it formats says so
    names -= GIVEN
    if unknown := [name for name in arguments if name not in names]:
        known = f"it reads {listed(sorted(names), 12)}" if names else "it reads no further values"
        raise UserError(f"{key}.{unknown[0]}: the chat template does not read {unknown[0]}; {known}")


def template_names(template: str) -> set[str] | None:
    """The variables that a template reads and does not set by itself; None if it cannot be parsed."""
    import jinja2
    from jinja2 import meta

    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return meta.find_undeclared_variables(environment.parse(_GENERATION.sub("", template)))
    except jinja2.TemplateSyntaxError:
        return None
