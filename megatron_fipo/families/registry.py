"""The registry of model families, and reading config.json to choose one.

A new family is one file and one line here.
"""

import json
from pathlib import Path
from typing import Any

from megatron_fipo.errors import UserError
from megatron_fipo.families.family import Architecture, Family
from megatron_fipo.families.llama import LLAMA
from megatron_fipo.families.qwen2 import QWEN2
from megatron_fipo.families.qwen3 import QWEN3
from megatron_fipo.families.qwen3_moe import QWEN3_MOE
from megatron_fipo.placeholders import refuse_placeholder

FAMILIES: dict[str, Family] = {
    name: family for family in (QWEN2, QWEN3, QWEN3_MOE, LLAMA) for name in family.architectures
}
"""By the names in the `architectures` field of config.json."""


def read_architecture(folder: str | Path) -> Architecture:
    """The architecture of the model in a Hugging Face folder; only config.json is read.

    Errors as `read_model_config`.
    """
    return read_model_config(folder)[1]


def read_model_config(folder: str | Path) -> tuple[Family, Architecture]:
    """The family named by a Hugging Face folder's config.json, and the model's architecture.

    UserError as `read_hf_config`; UserError naming the file for an unknown architecture, a missing or invalid
    size, and a variant that the family does not support.
    """
    hf_config = read_hf_config(folder)
    try:
        family = find_family(hf_config)
        return family, family.translate(hf_config)
    except UserError as error:
        raise UserError(f"{Path(folder) / 'config.json'}: {error}") from None


def find_family(hf_config: dict[str, Any]) -> Family:
    """The family of a parsed config.json, by its `architectures`.

    UserError listing the known ones for any other.
    """
    named = hf_config.get("architectures")
    names = [str(name) for name in named] if isinstance(named, list) else []
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    raise UserError(
        f"architecture {', '.join(names) or '(none named)'} is not supported; known: {', '.join(FAMILIES)}"
    )


def read_hf_config(folder: str | Path) -> dict[str, Any]:
    """The parsed `config.json` of a Hugging Face folder. UserError if there is none or it cannot be read."""
    path = Path(folder) / "config.json"
    if not path.parent.is_dir():
        raise UserError(
            f"no model folder {folder}; download the model, or make it with `megatron-fipo sft`, and give its folder "
            "(paths are relative to the current directory)"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if path.is_symlink():
            raise UserError(
                f"{path} is a link to a file that is gone; download the folder again with `hf download`"
            ) from None
        raise UserError(
            f"the model folder {folder} has no config.json; give a folder in Hugging Face format"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        refuse_placeholder(path)
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} has to be a JSON object")
    return config
