"""Loads Hugging Face weights into Megatron-Core model chunks, for any tensor and pipeline parallel layout."""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core import parallel_state

from megatron_fipo.checkpoint.safetensors_folder import SafetensorsFolder, require_exactly
from megatron_fipo.checkpoint.shard_layouts import map_model, shard
from megatron_fipo.errors import UserError
from megatron_fipo.families.family import Architecture, Weight
from megatron_fipo.model.mcore import is_quantized

IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
"""Tensors that some exporters store although they follow from the config."""


@torch.no_grad()
def load_hf_weights(
    model_chunks: Sequence[torch.nn.Module], folder: str | Path
) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Fill every parameter of this rank's chunks from a folder of safetensors, cast to the parameter's dtype.

    Returns, on the CPU, the exact values of parameters that round them (FP8), for master weights; empty for a
    bf16 model. Each rank reads only its own slices, one parameter at a time, without communication. Values of
    the same dtype are loaded bit for bit. UserError that lists missing and unexpected tensors, or names a
    tensor of the wrong shape; the parameters are unchanged in that case.
    """
    model = map_model(model_chunks)
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    source = SafetensorsFolder(folder)
    exact: dict[torch.nn.Parameter, torch.Tensor] = {}
    check_tensors(model.weights, model.architecture, source)
    for weight, parameter in model.local():
        values = shard(weight, [source.slice(name) for name in weight.names], model.architecture, rank, size)
        if values.shape != parameter.shape:
            raise ValueError(
                f"{weight.megatron} has shape {tuple(parameter.shape)}, its shard {tuple(values.shape)}"
            )
        parameter.copy_(values)
        if is_quantized(parameter):
            exact[parameter] = values.contiguous()
    return exact


def check_tensors(weights: Sequence[Weight], architecture: Architecture, source: SafetensorsFolder) -> None:
    """UserError unless the folder has exactly the model's tensors, in the model's shapes."""
    expected = {
        name: shape for weight in weights for name, shape in zip(weight.names, weight.shapes, strict=True)
    }
    found = {name for name in source.tensors if not name.endswith(IGNORED_SUFFIXES)}
    if architecture.share_embeddings_and_output_weights:
        found.discard("lm_head.weight")
    require_exactly(f"model folder {source.folder}", found, expected.keys(), "config.json")
    for name, shape in expected.items():
        stored = source.tensors[name].shape
        if stored != shape:
            raise UserError(
                f"{name} in {source.folder} has shape {list(stored)}; config.json requires {list(shape)}"
            )
