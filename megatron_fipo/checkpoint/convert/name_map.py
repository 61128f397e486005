"""Which Hugging Face tensor becomes which part of which Megatron parameter, and which rank holds it. On shapes alone.

`shard` and `join` in `mapping.py` move the numbers; this says where they go, for `convert --dry-run` and for whoever wants to look.
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
"""First and behind-last index in each dimension."""


@dataclass(frozen=True)
class Stage:
    """A model chunk: `chunk` counts the virtual pipeline chunks of pipeline rank `pipeline`."""

    pipeline: int
    chunk: int


@dataclass(frozen=True)
class MappedTensor:
    """One Hugging Face tensor on its way into a Megatron parameter."""

    name: str
    shape: tuple[int, ...]
    weight: Weight
    megatron_shape: tuple[int, ...]
    """Of the whole parameter, a vocabulary padded for this tensor-parallel size."""
    shard_shape: tuple[int, ...]
    """Of the parameter on each tensor-parallel rank."""
    stages: tuple[Stage, ...]
    """Who holds it: one, or the first and the last for an embedding that is the output layer too."""
    boxes: tuple[Box, ...]
    """By tensor-parallel rank: what of this Hugging Face tensor it holds."""


def name_map(family: Family, architecture: Architecture, parallel: ParallelConfig) -> list[MappedTensor]:
    """Every Hugging Face tensor of the model, in the order of the family's table. The sizes must divide (`build.check_split`)."""
    tp = parallel.tensor_model_parallel_size
    mapped = []
    for weight in family.weights(architecture):
        whole, stages = megatron_shape(weight, tp), stages_of(weight, architecture, parallel)
        for name, shape in zip(weight.names, weight.shapes, strict=True):
            boxes = tuple(hf_box(weight.layout, shape, rank, tp) for rank in range(tp))
            mapped.append(
                MappedTensor(
                    name, shape, weight, whole, _shard_shape(weight.layout, whole, tp), stages, boxes
                )
            )
    return mapped


def megatron_shape(weight: Weight, tensor_model_parallel_size: int = 1) -> tuple[int, ...]:
    """Of the whole parameter: the parts' rows on end, a vocabulary padded for the given number of ranks."""
    rows = sum(shape[0] for shape in weight.shapes)
    if weight.layout is Layout.VOCABULARY:
        rows = padded_vocab_size(rows, tensor_model_parallel_size)
    return (rows, *weight.shapes[0][1:])


def hf_box(layout: Layout, shape: tuple[int, ...], rank: int, size: int) -> Box:
    """What of a Hugging Face tensor of this shape tensor-parallel rank `rank` of `size` holds."""
    whole = tuple((0, length) for length in shape)
    if layout is Layout.REPLICATED:
        return whole
    if layout is Layout.ROW:
        width = shape[1] // size
        return (whole[0], (rank * width, (rank + 1) * width))
    rows = shape[0]
    height = (padded_vocab_size(rows, size) if layout is Layout.VOCABULARY else rows) // size
    return ((min(rank * height, rows), min((rank + 1) * height, rows)), *whole[1:])


def _shard_shape(layout: Layout, whole: tuple[int, ...], size: int) -> tuple[int, ...]:
    if layout is Layout.REPLICATED:
        return whole
    if layout is Layout.ROW:
        return (whole[0], whole[1] // size)
    return (whole[0] // size, *whole[1:])


def stages_of(weight: Weight, architecture: Architecture, parallel: ParallelConfig) -> tuple[Stage, ...]:
    """Layers go to pp · vp equal pieces; piece n is chunk n // pp of pipeline rank n % pp."""
    pp, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    first, last = Stage(0, 0), Stage(pp - 1, chunks - 1)
    if weight.layer is not None:
        piece = weight.layer // (architecture.num_layers // (pp * chunks))
        return (Stage(piece % pp, piece // pp),)
    if weight.megatron != EMBEDDING_WEIGHT:
        return (last,)
    return (first, last) if architecture.share_embeddings_and_output_weights and last != first else (first,)


def describe_map(family: Family, architecture: Architecture, parallel: ParallelConfig) -> Iterator[str]:
    """Lines of text: one for each Hugging Face tensor, then one for each pipeline rank."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    mapped = name_map(family, architecture, parallel)
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    yield (
        f"{family.name}: {architecture.num_layers} layers, {family.parameters(architecture):,} parameters in {len(mapped)} tensors; "
        f"tensor {tp} x pipeline {pp} = {tp * pp} ranks"
        + (f", {chunks} model chunks each" if chunks > 1 else "")
    )
    yield ""
    header = (
        "Hugging Face",
        "shape",
        "Megatron parameter",
        "whole",
        "layout",
        "stage",
        "each rank's shard",
        "of the tensor, rank by rank",
    )
    rows = [header, *(_row(tensor, chunks) for tensor in mapped)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    yield ""
    for stage in range(pp):
        held = {
            tensor.weight.megatron: tensor.weight
            for tensor in mapped
            if any(at.pipeline == stage for at in tensor.stages)
        }
        parameters = sum(weight.parameters_per_rank(tp) for weight in held.values())
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
    """`rows 0:640 640:1280 ...`, one range for each rank, or `all` where every rank holds all."""
    whole = tuple((0, length) for length in tensor.shape)
    if all(box == whole for box in tensor.boxes):
        return "all"
    dimension = next(d for d in range(len(tensor.shape)) if any(box[d] != whole[d] for box in tensor.boxes))
    ranges = " ".join(f"{first}:{last}" for first, last in (box[dimension] for box in tensor.boxes))
    return f"{('rows', 'columns')[dimension]} {ranges}"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
