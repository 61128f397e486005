"""Megatron-Core model chunks back into Hugging Face tensors: streamed to whoever wants them, or into a folder."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_fipo.checkpoint.hf_writer import HFWriter
from megatron_fipo.checkpoint.mapping import ModelMap, join, map_model
from megatron_fipo.errors import UserError
from megatron_fipo.model.family import Layout, Weight


@torch.no_grad()
def iterate_hf_tensors(model_chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Every Hugging Face tensor of the model, one at a time, as (name, full CPU tensor) on global rank 0.

    Collective: all ranks iterate, to the end and in step; they see the same names in the same order, and None for the tensor.
    Tensors have the parameters' dtype. Where embeddings are tied there is no `lm_head.weight`.

    Communication is within data-parallel and context-parallel rank 0; the other replicas yield None at once. First one
    all_gather_object of parameter names over the pipeline group. Then for each of the model's parameters: one gather over the
    tensor-parallel group of the stage that holds it (the whole parameter arrives at its rank 0), and for stages other than the
    first one send of the whole to the first. Memory beyond the model: one whole parameter (with its query, key and value, or
    gate and up, together), on the device and on the host; at most the embedding.
    """
    model = map_model(model_chunks)
    speaking = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    owners = _owners(model) if speaking else {}
    for weight in model.weights:
        parts = _collect(weight, model, owners[weight.megatron]) if speaking else None
        for index, name in enumerate(weight.names):
            yield name, None if parts is None else parts[index]


def save_hf(
    model_chunks: Sequence[torch.nn.Module],
    source_folder: str | Path,
    target_folder: str | Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the model as a Hugging Face folder: safetensors of at most 4 GB, config, tokenizer, generation config, chat template.

    All but the weights is copied from `source_folder`. `dtype` None keeps the parameters' dtype. The folder appears under
    its name only when it is complete. Collective, with the communication of `iterate_hf_tensors` and two small broadcasts;
    global rank 0 writes, holding one shard in memory.
    UserError on every rank if the target exists or cannot be written (disk full); then nothing is left behind.
    """
    model = map_model(model_chunks)
    writer, problem = None, None
    if dist.get_rank() == 0:
        sizes = {name: shape for weight in model.weights for name, shape in zip(weight.names, weight.shapes, strict=True)}
        stored = dtype or next(iter(model.parameters.values())).dtype
        try:
            writer = HFWriter(Path(source_folder), Path(target_folder), sizes, stored)
        except UserError as error:
            problem = str(error)
    _raise_everywhere(problem)
    for name, tensor in iterate_hf_tensors(model_chunks):
        if writer is not None and tensor is not None and problem is None:
            try:
                writer.add(name, tensor)
            except UserError as error:
                # The other ranks are still sending: hear them out before telling them.
                problem = str(error)
    if writer is not None and problem is None:
        try:
            writer.finish()
        except UserError as error:
            problem = str(error)
    _raise_everywhere(problem)


def _raise_everywhere(problem: str | None) -> None:
    """Broadcast rank 0's problem; UserError on all ranks if there is one. Collective over the world."""
    box = [problem]
    dist.broadcast_object_list(box, src=0)
    if box[0] is not None:
        raise UserError(box[0])


def _owners(model: ModelMap) -> dict[str, int]:
    """The first pipeline stage that holds each parameter."""
    group = parallel_state.get_pipeline_model_parallel_group()
    held: list[list[str]] = [[] for _ in range(group.size())]
    dist.all_gather_object(held, list(model.parameters), group=group)
    return {name: stage for stage in reversed(range(len(held))) for name in held[stage]}


def _collect(weight: Weight, model: ModelMap, owner: int) -> list[torch.Tensor] | None:
    """The whole parts of one weight on the first stage's tensor-parallel rank 0; None on the other ranks."""
    stage, tp_rank = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()
    parts = None
    if stage == owner:
        shards = _gather(model.parameters[weight.megatron].detach(), weight.layout)
        parts = join(weight, shards, model.architecture) if tp_rank == 0 else None
    if owner == 0 or tp_rank != 0 or stage not in (0, owner):
        return None if parts is None else [part.cpu() for part in parts]
    group = parallel_state.get_pipeline_model_parallel_group()
    if stage == owner:
        assert parts is not None
        for part in parts:
            dist.send(part.contiguous(), dist.get_global_rank(group, 0), group=group)
        return None
    like = next(iter(model.parameters.values()))
    received = [torch.empty(shape, dtype=like.dtype, device=like.device) for shape in weight.shapes]
    for part in received:
        dist.recv(part, dist.get_global_rank(group, owner), group=group)
    return [part.cpu() for part in received]


def _gather(shard: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
    """All shards of a parameter on tensor-parallel rank 0, an empty list on the others. Replicated ones need no gather."""
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1 or layout is Layout.REPLICATED:
        return [shard]
    receives = group.rank() == 0
    shards = [torch.empty_like(shard) for _ in range(group.size())] if receives else []
    dist.gather(shard.contiguous(), shards if receives else None, dst=dist.get_global_rank(group, 0), group=group)
    return shards
