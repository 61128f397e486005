"""A randomly initialized model as a Hugging Face folder: the start of training from scratch."""

import zlib
from pathlib import Path

import torch

from megatron_fipo.checkpoint.hf_writer import HFWriter
from megatron_fipo.families.registry import read_model_config


def random_hf_weight(name: str, shape: tuple[int, ...], initializer_range: float, seed: int) -> torch.Tensor:
    """One float32 tensor: ones for norms, zeros for biases, else normal with the given standard deviation.

    It depends only on its name, its shape and the seed, not on the parallel layout or the order of creation.
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.empty(shape).normal_(0.0, initializer_range, generator=generator)


def write_random_model(
    source: str | Path, target: str | Path, seed: int, dtype: torch.dtype = torch.float32
) -> None:
    """Write the model of `source/config.json` to `target`, with random weights.

    Tokenizer and similar files are copied. One process, without Megatron groups. UserError as for `save_hf`,
    and for an unknown architecture.
    """
    family, architecture = read_model_config(source)
    shapes = {
        name: shape
        for weight in family.weights(architecture)
        for name, shape in zip(weight.names, weight.shapes, strict=True)
    }
    writer = HFWriter(Path(source), Path(target), shapes, dtype)
    for name, shape in shapes.items():
        writer.add(name, random_hf_weight(name, shape, architecture.initializer_range, seed))
    writer.finish()
