"""The registry of model families, and reading the config.json that picks one. A new family is one file and one line here."""

import json
from pathlib import Path
from typing import Any

from megatron_fipo.errors import UserError
from megatron_fipo.model.family import Family
from megatron_fipo.model.qwen2 import QWEN2

FAMILIES: dict[str, Family] = {architecture: family for family in (QWEN2,) for architecture in family.architectures}


def find_family(hf_config: dict[str, Any]) -> Family:
    """The family of a parsed config.json, by its `architectures`. UserError listing the known ones for any other."""
    named = hf_config.get("architectures") or []
    for architecture in named:
        if architecture in FAMILIES:
            return FAMILIES[architecture]
    raise UserError(f"model architecture {', '.join(named) or 'unnamed'} is not supported; known are: {', '.join(FAMILIES)}")


def read_hf_config(folder: str | Path) -> dict[str, Any]:
    """The parsed `config.json` of a Hugging Face folder. UserError where there is none or it cannot be read."""
    path = Path(folder) / "config.json"
    if not path.parent.is_dir():
        raise UserError(f"model folder {folder} does not exist")
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"model folder {folder} has no config.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return config
