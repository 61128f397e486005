"""config.json as transformers reads it, compared with the reading that Megatron-Core's model is built from."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_fipo.checkpoint.model_folder import read_description
from megatron_fipo.checkpoint.tokenizer import GENERATION_CONFIG
from megatron_fipo.errors import UserError, one_line
from megatron_fipo.families.registry import read_hf_config

DTYPES = ("bfloat16", "float16", "float32", "float64")
"""Values of `dtype` (`torch_dtype` before transformers 5) in config.json."""


def load_hf_config(folder: str | Path, trust_remote_code: bool) -> Any:
    """The `PreTrainedConfig` of a folder.

    UserError as `read_description`; if transformers refuses config.json or generation_config.json, or reads
    another size, rotation or norm in config.json than `read_description`.
    """
    from transformers import AutoConfig, GenerationConfig

    family, architecture = read_description(folder)
    path, generation = Path(folder) / "config.json", Path(folder) / GENERATION_CONFIG
    _check_dtype(path)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    with _refused_by_transformers(path):
        config = AutoConfig.from_pretrained(folder, **options)
        if not generation.is_file():
            GenerationConfig.from_model_config(config)
        theirs = asdict(family.translate(config.to_dict()))
    if generation.is_file():
        with _refused_by_transformers(generation):
            GenerationConfig.from_pretrained(folder, **options)
    different = [
        f"{key} is {value} and {theirs[key]}"
        for key, value in asdict(architecture).items()
        if theirs[key] != value
    ]
    if different:
        raise UserError(
            f"config.json in {folder} is read in two ways, here and by transformers: {', '.join(different)}; "
            "state these keys as transformers saves them"
        )
    return config


def _check_dtype(path: Path) -> None:
    """UserError for a dtype that torch does not have. The error of transformers would not name the key."""
    config = read_hf_config(path.parent)
    for key in ("dtype", "torch_dtype"):
        if config.get(key) is not None and config[key] not in DTYPES:
            raise UserError(
                f"{path} has {key}={json.dumps(config[key])}, which transformers can't read; set it to one of "
                f"{', '.join(DTYPES)}"
            )


@contextmanager
def _refused_by_transformers(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the error of a wrong value depends on the key
        raise UserError(
            f"{path} is not readable by transformers: {one_line(error)}; correct the key"
        ) from error
