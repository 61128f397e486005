"""Load a Hugging Face model folder for a rollout engine."""

from pathlib import Path
from typing import Any

from megatron_fipo.errors import UserError, first_line


def load_model(
    path: str, dtype: str, trust_remote_code: bool, load_weights: bool
) -> tuple[Any, frozenset[int]]:
    """The model on the current device, and the ids of the tokens that end a response.

    Without `load_weights` the weights in the folder are not read and those of the model are undefined. Raises
    `UserError` if the folder is unreadable, has an architecture unknown to `transformers`, or names no
    end-of-sequence token.
    """
    if not Path(path, "config.json").is_file():
        raise UserError(
            f"model.path {path} is not a folder with a config.json; give a model folder in Hugging Face "
            "format"
        )
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.initialization import no_init_weights

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(path, **options)
        if load_weights:
            model = AutoModelForCausalLM.from_pretrained(
                path, config=config, dtype=getattr(torch, dtype), **options
            )
        else:
            with no_init_weights():
                model = AutoModelForCausalLM.from_config(
                    config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
                )
            model.tie_weights()
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        has_own = Path(path, "generation_config.json").is_file()
        defaults = GenerationConfig.from_pretrained(path, **options) if has_own else model.generation_config
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the rollout engine can't read model.path {path}: {first_line(error)}") from error
    named = _ids(defaults.eos_token_id) | _ids(tokenizer.eos_token_id)
    # Some tokenizer classes add an end token that the folder does not name: its id is outside the model's
    # vocabulary.
    end_ids = frozenset(token for token in named if token < config.get_text_config().vocab_size)
    if not end_ids:
        raise UserError(
            f"neither tokenizer nor generation_config.json in {path} names an end-of-sequence token; set "
            "eos_token"
        )
    return model, end_ids


def _ids(named: int | list[int] | None) -> set[int]:
    if named is None:
        return set()
    return {named} if isinstance(named, int) else set(named)
