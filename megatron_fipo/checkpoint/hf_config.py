"""config.json as transformers reads it, compared with the reading that Megatron-Core's model is built from."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_fipo.checkpoint.model_folder import read_description
from megatron_fipo.checkpoint.tokenizer import GENERATION_CONFIG
from megatron_fipo.errors import UserError, first_line


def load_hf_config(folder: str | Path, trust_remote_code: bool) -> Any:
    """The `PreTrainedConfig` of a folder.

    UserError as `read_description`; if transformers refuses config.json or generation_config.json, or reads
    another size, rotation or norm in config.json than `read_description`.
    """
    from transformers import AutoConfig, GenerationConfig

    family, architecture = read_description(folder)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(folder, **options)
        if (Path(folder) / GENERATION_CONFIG).is_file():
            GenerationConfig.from_pretrained(folder, **options)
        else:
            GenerationConfig.from_model_config(config)
        theirs = asdict(family.translate(config.to_dict()))
    except Exception as error:  # the error of a wrong value depends on the key
        raise UserError(
            f"transformers can't read config.json or {GENERATION_CONFIG} in {folder}: {first_line(error)}; "
            "correct the key"
        ) from error
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
