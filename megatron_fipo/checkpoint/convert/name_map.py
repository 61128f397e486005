"""The mapping of Hugging Face tensors to Megatron parameters and ranks, computed from shapes only.

`shard` and `join` in `checkpoint/shard_layouts.py` convert the values. This module describes the mapping, for
`convert --dry-run` and for the plan of a run.
"""

from collections.abc import Iterator
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
    """Of the parameter on each tensor-parallel rank."""
    stages: tuple[ModelChunk, ...]
    """The chunks that have it: one, or the first and the last for a tied embedding."""
    boxes: tuple[Box, ...]
    """By tensor-parallel rank: its part of this Hugging Face tensor."""


def name_map(family: Family, architecture: Architecture, parallel: ParallelConfig) -> list[MappedTensor]:
    """Every Hugging Face tensor of the model, in the order of the family's table.

    The sizes must be divisible (`config.divisibility`).
    """
    tp = parallel.tensor_model_parallel_size
    mapped = []
    for weight in family.weights(architecture):
        complete, stages = megatron_shape(weight, tp), stages_of(weight, architecture, parallel)
        for name, shape in zip(weight.names, weight.shapes, strict=True):
            boxes = tuple(hf_box(weight.layout, shape, rank, tp) for rank in range(tp))
            mapped.append(
                MappedTensor(
                    name, shape, weight, complete, _shard_shape(weight.layout, complete, tp), stages, boxes
                )
            )
    return mapped


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


def describe_map(family: Family, architecture: Architecture, parallel: ParallelConfig) -> Iterator[str]:
    """Lines of text: one per Hugging Face tensor, then one per pipeline rank."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    mapped = name_map(family, architecture, parallel)
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    yield (
        f"{family.name}: {architecture.num_layers} layers, {family.parameters(architecture):,} parameters in "
        f"{len(mapped)} tensors; tensor {tp} x pipeline {pp} = {tp * pp} ranks"
        + (f", {chunks} model chunks each" if chunks > 1 else "")
    )
    yield ""
    header = (
        "Hugging Face",
        "shape",
        "Megatron parameter",
        "full shape",
        "layout",
        "stage",
        "each rank's shard",
        "part of the tensor, by rank",
    )
    rows = [header, *(_row(tensor, chunks) for tensor in mapped)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    yield ""
    for stage in range(pp):
        weights = {
            tensor.weight.megatron: tensor.weight
            for tensor in mapped
            if any(at.pipeline == stage for at in tensor.stages)
        }
        parameters = sum(weight.parameters_per_rank(tp) for weight in weights.values())
        ranks = f"rank {stage}" if tp == 1 else f"ranks {stage * tp}-{stage * tp + tp - 1}"
        yield f"pipeline stage {stage} ({ranks}): {parameters:,} parameters on each rank"


def _row(tensor: MappedTensor, chunks: int) -> tuple[str, ...]:
    stages = (f"{at.pipeline}.{at.chunk}" if chunks > 1 else str(at.pipeline) for at in tensor.stages)
    return (
        tensor.name,
        _shape(tensor.shape),
        tensor.weight.megatron,
        _shape(tensor.megatron_shape),
        tensor.weight.layout.value,
        ",".join(stages),
        _shape(tensor.shard_shape),
        _boxes(tensor),
    )


def _boxes(tensor: MappedTensor) -> str:
    """`rows 0:640 640:1280 ...`, one range per rank, or `all` if every rank has the complete tensor."""
    full = tuple((0, length) for length in tensor.shape)
    if all(box == full for box in tensor.boxes):
        return "all"
    dimension = next(d for d in range(len(tensor.shape)) if any(box[d] != full[d] for box in tensor.boxes))
    ranges = " ".join(f"{first}:{last}" for first, last in (box[dimension] for box in tensor.boxes))
    return f"{('rows', 'columns')[dimension]} {ranges}"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
