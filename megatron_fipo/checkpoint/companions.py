"""The files of a Hugging Face folder besides its weights: config, tokenizer, chat template and similar."""

import shutil
from pathlib import Path

from megatron_fipo.errors import UserError

COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates",
    "*.model",
    "*.tiktoken",
    "*.py",
    "LICENSE*",
)
"""Files that are copied with the weights, as glob patterns."""


def copy_companions(source: Path, folder: Path) -> None:
    """Copy config, tokenizer, chat template and similar files (`COMPANIONS`) into an existing folder.

    Raises OSError, and UserError if `source` is not a model folder (any more).
    """
    if not (source / "config.json").is_file():
        raise UserError(
            f"the model folder {source} is gone or has no config.json; restore it, then run the same command "
            "again"
        )
    for path in sorted({path for pattern in COMPANIONS for path in source.glob(pattern)}):
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)
