"""Loads Hugging Face weights into Megatron-Core model chunks, for any parallel layout."""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core import parallel_state

from megatron_fipo import progress
from megatron_fipo.checkpoint.finite import check_stored_values, is_finite
from megatron_fipo.checkpoint.model_folder import open_model_folder
from megatron_fipo.checkpoint.shard_layouts import map_model, shard
from megatron_fipo.errors import UserError
from megatron_fipo.model.mcore import is_quantized


@torch.no_grad()
def load_hf_weights(
    model_chunks: Sequence[torch.nn.Module], folder: str | Path
) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Fill every parameter of this rank's chunks from a folder of safetensors, cast to the parameter's dtype.

    Returns, on the CPU, the exact values of parameters that round them (FP8), for master weights; empty for a
    bf16 model. Each rank reads only its own slices, one parameter at a time, without communication. Values of
    the same dtype are loaded bit for bit.

    UserError as `open_model_folder`, and if config.json describes another model than `model_chunks`: the
    parameters are unchanged in these cases. UserError that names a tensor with NaN or infinite values in this
    rank's slices, which are checked while they are in memory: parameters before it are loaded.
    """
    model = map_model(model_chunks)
    tensor = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    expert_tensor = (
        parallel_state.get_expert_tensor_parallel_rank(),
        parallel_state.get_expert_tensor_parallel_world_size(),
    )
    opened = open_model_folder(folder)
    if opened.architecture != model.architecture:
        raise UserError(
            f"config.json in {folder} describes another model than the one that was built from it"
        )
    exact: dict[torch.nn.Parameter, torch.Tensor] = {}
    for weight, parameter in model.local():
        slices = [opened.source.slice(name) for name in weight.names]
        rank, size = tensor if weight.expert is None else expert_tensor
        values = shard(weight, slices, model.architecture, rank, size)
        if values.shape != parameter.shape:
            raise ValueError(
                f"{weight.megatron} has shape {tuple(parameter.shape)}, its shard {tuple(values.shape)}"
            )
        if not is_finite(values.to(parameter.dtype)):
            check_stored_values(opened.source, parameter.dtype, weight.names)
        parameter.copy_(values)
        progress.advance()
        if is_quantized(parameter):
            exact[parameter] = values.contiguous()
    return exact
