"""The tokenizer of a model folder, and what the driver needs of it."""

from typing import Any

from megatron_fipo.checkpoint.hf_config import load_hf_config
from megatron_fipo.checkpoint.model_folder import open_model_folder
from megatron_fipo.checkpoint.tokenizer import load_tokenizer


def checked_tokenizer(folder: str, trust_remote_code: bool) -> Any:
    """The tokenizer of a model folder, after every check of the folder that needs no values of weights.

    UserError as `open_model_folder`, `load_hf_config` and `load_tokenizer`.
    """
    architecture = open_model_folder(folder).architecture
    load_hf_config(folder, trust_remote_code)  # first: the tokenizer's class reads config.json too
    tokenizer, _ = load_tokenizer(folder, trust_remote_code, architecture.vocab_size)
    return tokenizer


def prints_date(tokenizer: Any) -> bool:
    """Whether the chat template prints the date or the time."""
    return "strftime_now" in str(tokenizer.chat_template)


def pad_id(tokenizer: Any) -> int:
    """Padding never reaches the loss; any valid id will do."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
