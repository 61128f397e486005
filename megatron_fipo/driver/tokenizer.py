"""The tokenizer of a model folder, and what the driver needs of it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_fipo.errors import UserError, first_line


def load_tokenizer(folder: str, trust_remote_code: bool) -> Any:
    """The tokenizer of a Hugging Face folder. Raises `UserError` if it cannot be read."""
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise UserError(
            f"model folder {folder} does not exist; give model.path a folder in Hugging Face format."
        )
    try:
        return AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # the error of a damaged tokenizer.json depends on the damage
        raise UserError(
            f"cannot read the tokenizer in {folder} ({first_line(error)}); restore tokenizer.json and tokenizer_config.json"
        ) from error


def prints_date(tokenizer: Any) -> bool:
    """Whether the chat template prints the date or the time."""
    return "strftime_now" in str(tokenizer.chat_template)


def decoder(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Token ids to text without special tokens."""
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True)


def pad_id(tokenizer: Any) -> int:
    """Padding never reaches the loss; any valid id will do."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
