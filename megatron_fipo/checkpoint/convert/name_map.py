"""The mapping of Hugging Face tensors to Megatron parameters and ranks, computed from shapes only.

`shard` and `join` in `checkpoint/shard_layouts.py` convert the values. This module describes the mapping, for
`convert --dry-run` and for the plan of a run.
"""

from dataclasses import dataclass

from megatron_fipo.config import ParallelConfig
from megatron_fipo.families.family import (
    EMBEDDING_WEIGHT,
    Architecture,
    Family,
    Layout,
    Weight,
    padded_vocab_size,
)

Box = tuple[tuple[int, int], ...]
"""First and last index (exclusive) in each dimension."""


@dataclass(frozen=True)
class ModelChunk:
    """A model chunk of a pipeline rank."""

    pipeline: int
    """Pipeline rank."""
    chunk: int
    """Virtual pipeline stage on that rank; 0 without virtual stages."""


@dataclass(frozen=True)
class MappedTensor:
    """One Hugging Face tensor and the Megatron parameter that contains it."""

    name: str
    shape: tuple[int, ...]
    weight: Weight
    megatron_shape: tuple[int, ...]
    """Of the complete parameter, with the vocabulary padded for this tensor-parallel size."""
    shard_shape: tuple[int, ...]
    """Of the parameter on each tensor-parallel rank (of an expert: expert-tensor-parallel)."""
    stages: tuple[ModelChunk, ...]
    """The chunks that have it: one, or the first and the last for a tied embedding."""
    boxes: tuple[Box, ...]
    """By the same ranks: their part of this Hugging Face tensor."""
    expert_rank: int | None
    """The expert-parallel rank that has it; None outside experts, for all."""


def name_map(family: Family, architecture: Architecture, parallel: ParallelConfig) -> list[MappedTensor]:
    """Every Hugging Face tensor of the model, in the order of the family's table.

    The sizes must be divisible (`config.divisibility`).
    """
    mapped = []
    for weight in family.weights(architecture):
        size = _tensor_ranks(weight, parallel)
        complete, stages = megatron_shape(weight, size), stages_of(weight, architecture, parallel)
        for name, shape in zip(weight.names, weight.shapes, strict=True):
            boxes = tuple(hf_box(weight.layout, shape, rank, size) for rank in range(size))
            mapped.append(
                MappedTensor(
                    name,
                    shape,
                    weight,
                    complete,
                    _shard_shape(weight.layout, complete, size),
                    stages,
                    boxes,
                    expert_rank_of(weight, architecture, parallel),
                )
            )
    return mapped


def _tensor_ranks(weight: Weight, parallel: ParallelConfig) -> int:
    """Ranks that share a weight."""
    if weight.expert is None:
        return parallel.tensor_model_parallel_size
    return parallel.expert_tensor_parallel_size


def expert_rank_of(weight: Weight, architecture: Architecture, parallel: ParallelConfig) -> int | None:
    """The expert-parallel rank of an expert's weight: each rank has consecutive experts. None for other weights."""
    if weight.expert is None or architecture.experts is None:
        return None
    return weight.expert * parallel.expert_model_parallel_size // architecture.experts.count


def megatron_shape(weight: Weight, tensor_model_parallel_size: int = 1) -> tuple[int, ...]:
    """Shape of the complete parameter: the tensors' rows concatenated, a vocabulary padded for all ranks."""
    rows = sum(shape[0] for shape in weight.shapes)
    if weight.layout is Layout.VOCABULARY:
        rows = padded_vocab_size(rows, tensor_model_parallel_size)
    return (rows, *weight.shapes[0][1:])


def hf_box(layout: Layout, shape: tuple[int, ...], rank: int, size: int) -> Box:
    """The part of a Hugging Face tensor of this shape on tensor-parallel rank `rank` of `size`."""
    full = tuple((0, length) for length in shape)
    if layout is Layout.REPLICATED:
        return full
    if layout is Layout.ROW:
        width = shape[1] // size
        return (full[0], (rank * width, (rank + 1) * width))
    rows = shape[0]
    height = (padded_vocab_size(rows, size) if layout is Layout.VOCABULARY else rows) // size
    return ((min(rank * height, rows), min((rank + 1) * height, rows)), *full[1:])


def _shard_shape(layout: Layout, full: tuple[int, ...], size: int) -> tuple[int, ...]:
    if layout is Layout.REPLICATED:
        return full
    if layout is Layout.ROW:
        return (full[0], full[1] // size)
    return (full[0] // size, *full[1:])


def stages_of(weight: Weight, architecture: Architecture, parallel: ParallelConfig) -> tuple[ModelChunk, ...]:
    """The chunks that have a weight.

    The layers are divided into pp · vp equal blocks; block n is chunk n // pp of pipeline rank n % pp.
    """
    pp, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    first, last = ModelChunk(0, 0), ModelChunk(pp - 1, chunks - 1)
    if weight.layer is not None:
        block = weight.layer // (architecture.num_layers // (pp * chunks))
        return (ModelChunk(block % pp, block // pp),)
    if weight.megatron != EMBEDDING_WEIGHT:
        return (last,)
    return (first, last) if architecture.share_embeddings_and_output_weights and last != first else (first,)
