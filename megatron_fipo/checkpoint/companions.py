"""The files of a Hugging Face folder besides its weights: config, tokenizer, chat template and similar."""

import shutil
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from megatron_fipo.errors import UserError

MODEL_FILES = (
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
    "tekken.json",
    "*.py",
)
"""Files that decide how the model is built and its text is tokenized, as glob patterns."""
COMPANIONS = (*MODEL_FILES, "LICENSE*")
"""Files that are copied with the weights, as glob patterns."""
BACKUPS = ("*.bak", "*.orig", "*.old", "*~", ".*", "#*#")
"""Copies that editors and users keep beside a file. No reader takes them."""


def is_backup(name: str) -> bool:
    """Whether a file of this name, or a folder in the path `name`, is a backup or hidden."""
    return any(fnmatchcase(part, pattern) for part in name.split("/") for pattern in BACKUPS)


def companions(folder: Path, patterns: Sequence[str] = COMPANIONS) -> list[Path]:
    """The files and folders of a model folder that match the patterns, in order, without backups."""
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    return sorted(path for path in found if not is_backup(path.name))


def copy_companions(source: Path, folder: Path) -> None:
    """Copy config, tokenizer, chat template and similar files (`COMPANIONS`) into an existing folder.

    Raises OSError, and UserError if `source` is not a model folder (any more).
    """
    if not (source / "config.json").is_file():
        raise UserError(
            f"the model folder {source} is gone or has no config.json; restore it, then run the same command "
            "again"
        )
    for path in companions(source):
        if path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns(*BACKUPS))
        else:
            shutil.copyfile(path, folder / path.name)
