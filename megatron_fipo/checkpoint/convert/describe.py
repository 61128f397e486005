"""The map of a model's tensors as text, for `convert --dry-run`."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from megatron_fipo.checkpoint.convert.name_map import MappedTensor, name_map
from megatron_fipo.config import ParallelConfig
from megatron_fipo.families.family import Architecture, Family

_HEADER = (
    "Hugging Face",
    "shape",
    "Megatron parameter",
    "full shape",
    "layout",
    "stage",
    "each rank's shard",
    "part of the tensor, by rank",
)


def describe_map(family: Family, architecture: Architecture, parallel: ParallelConfig) -> Iterator[str]:
    """Lines of text: one per Hugging Face tensor, all experts of a layer in one, then one per pipeline rank."""
    mapped = name_map(family, architecture, parallel)
    yield (
        f"{family.name}: {architecture.num_layers} layers, {family.parameters(architecture):,} parameters in "
        f"{len(mapped)} tensors; {_ranks(architecture, parallel)}"
    )
    yield ""
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    rows = [_HEADER, *(_row(group, chunks) for group in _without_expert(mapped))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    yield ""
    for stage in range(parallel.pipeline_model_parallel_size):
        first, last = stage * parallel.stage_size, (stage + 1) * parallel.stage_size - 1
        ranks = f"rank {first}" if first == last else f"ranks {first}-{last}"
        parameters = _parameters_per_rank(mapped, stage, parallel)
        yield f"pipeline stage {stage} ({ranks}): {parameters:,} parameters on each rank"


def _ranks(architecture: Architecture, parallel: ParallelConfig) -> str:
    sizes = [
        f"tensor {parallel.tensor_model_parallel_size}",
        f"pipeline {parallel.pipeline_model_parallel_size}",
        *([f"data {parallel.data_parallel_size}"] if parallel.data_parallel_size > 1 else []),
    ]
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    return (
        f"{' x '.join(sizes)} = {parallel.world_size} ranks"
        + (f", {chunks} model chunks each" if chunks > 1 else "")
        + (
            f"; experts: expert tensor {parallel.expert_tensor_parallel_size} x expert "
            f"{parallel.expert_model_parallel_size}"
            if architecture.experts
            else ""
        )
    )


def _without_expert(mapped: Sequence[MappedTensor]) -> list[list[MappedTensor]]:
    """One tensor each, or the tensors of all experts of a layer that differ only in the expert."""
    groups: dict[str, list[MappedTensor]] = {}
    for tensor in mapped:
        groups.setdefault(_of_experts(tensor.name, tensor), []).append(tensor)
    return list(groups.values())


def _of_experts(name: str, tensor: MappedTensor, experts: str = "*") -> str:
    """A tensor's name in either format with `experts` in the place of its expert."""
    expert = tensor.weight.expert
    return name if expert is None else name.replace(f"experts.{expert}.", f"experts.{experts}.", 1)


def _row(group: Sequence[MappedTensor], chunks: int) -> tuple[str, ...]:
    tensor, experts = group[0], f"{{0-{len(group) - 1}}}"
    stages = (f"{at.pipeline}.{at.chunk}" if chunks > 1 else str(at.pipeline) for at in tensor.stages)
    return (
        _of_experts(tensor.name, tensor, experts),
        _shape(tensor.shape),
        _of_experts(tensor.weight.megatron, tensor, experts),
        _shape(tensor.megatron_shape),
        tensor.weight.layout.value,
        ",".join(stages),
        _shape(tensor.shard_shape),
        _experts(group) + _boxes(tensor),
    )


def _experts(group: Sequence[MappedTensor]) -> str:
    """`experts 0:16 16:32 ...; `, one range per expert-parallel rank; empty if the tensor is not of an expert."""
    if group[0].expert_rank is None:
        return ""
    counts = [len(list(of_rank)) for _, of_rank in groupby(group, key=lambda tensor: tensor.expert_rank)]
    return f"experts {' '.join(f'{rank * n}:{(rank + 1) * n}' for rank, n in enumerate(counts))}; "


def _boxes(tensor: MappedTensor) -> str:
    """`rows 0:640 640:1280 ...`, one range per rank, or `all` if every rank has the complete tensor."""
    full = tuple((0, length) for length in tensor.shape)
    if all(box == full for box in tensor.boxes):
        return "all"
    dimension = next(d for d in range(len(tensor.shape)) if any(box[d] != full[d] for box in tensor.boxes))
    ranges = " ".join(f"{first}:{last}" for first, last in (box[dimension] for box in tensor.boxes))
    return f"{('rows', 'columns')[dimension]} {ranges}"


def _parameters_per_rank(mapped: Sequence[MappedTensor], stage: int, parallel: ParallelConfig) -> int:
    """Of each rank of a pipeline stage."""
    weights = {
        tensor.weight.megatron: tensor
        for tensor in mapped
        # All expert-parallel ranks have as many experts as the first.
        if tensor.expert_rank in (None, 0) and any(at.pipeline == stage for at in tensor.stages)
    }
    return sum(tensor.weight.parameters_per_rank(len(tensor.boxes)) for tensor in weights.values())


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
