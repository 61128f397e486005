"""Checks of the settings of supervised training against each other and the model. Pure."""

from typing import TYPE_CHECKING

from megatron_fipo.config.sft_schema import SftConfig, SftDataConfig
from megatron_fipo.config.task_schema import FILE_SOURCES
from megatron_fipo.errors import UserError
from megatron_fipo.field_rules import is_import_path

if TYPE_CHECKING:
    from megatron_fipo.families.family import Architecture


def check_start(config: SftConfig) -> None:
    """Raise UserError unless there is one folder to start from."""
    if (config.model_path is None) == (config.model_config_path is None):
        both = "both given; remove one" if config.model_path else "both absent; give one"
        raise UserError(
            f"model_path (a folder with weights) and model_config_path (config and tokenizer, for random weights) are {both}"
        )


FOR_RANDOM_WEIGHTS = 1e-3
"""A learning rate from which on weights that were trained before are lost within a few steps."""


def rate_note(config: SftConfig) -> str | None:
    """What to report of a learning rate that suits random weights and is used on trained ones."""
    if config.model_path is None or config.optimizer.lr < FOR_RANDOM_WEIGHTS:
        return None
    return (
        f"optimizer.lr={config.optimizer.lr:g} suits random weights; from {config.model_path} it may lose what the model knows "
        "(1e-5 is usual)"
    )


def check_supervised_data(config: SftConfig, architecture: "Architecture | None") -> None:
    """Raise UserError if rows are missing or given twice, or if their length fits neither a step nor the model."""
    data = config.data
    if data.source == "countdown":
        for key in ("path", "held_out_path", "held_out_share", "columns", "system_prompt"):
            if getattr(data, key):
                raise UserError(
                    f"data.source=countdown generates its traces; remove data.{key}, or read rows with data.source={FILE_SOURCES[1]}"
                )
        return
    if data.path is None and not is_import_path(data.source):
        raise UserError(f"data.source={data.source} needs data.path, a file of rows to train on")
    if data.held_out_path is not None and data.held_out_share:
        raise UserError(
            f"data.held_out_path={data.held_out_path} and data.held_out_share={data.held_out_share} are both given; remove one"
        )
    _check_length(config, data, architecture)


def _check_length(config: SftConfig, data: SftDataConfig, architecture: "Architecture | None") -> None:
    multiple = config.parallel.length_multiple
    padded = -(-data.max_length // multiple) * multiple
    limits = {"tokens_per_step": (config.tokens_per_step, data.max_length)}
    if config.max_tokens_per_micro_batch is not None:
        limits["max_tokens_per_micro_batch"] = (config.max_tokens_per_micro_batch, padded)
    for key, (limit, needed) in limits.items():
        if needed > limit:
            why = "" if needed == data.max_length else f" ({needed} as a multiple of {multiple})"
            raise UserError(
                f"data.max_length={data.max_length}{why} must be at most {key}={limit}; lower it or raise that"
            )
    if architecture is not None and data.max_length > architecture.max_position_embeddings:
        raise UserError(
            f"data.max_length={data.max_length} exceeds the model's max_position_embeddings="
            f"{architecture.max_position_embeddings}; lower it"
        )
