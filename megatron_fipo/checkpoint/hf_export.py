"""Megatron-Core model chunks back into Hugging Face tensors: streamed to whoever wants them, or into a folder."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_fipo.checkpoint.hf_writer import HFWriter
from megatron_fipo.checkpoint.shard_layouts import ModelMap, join, map_model
from megatron_fipo.errors import UserError
from megatron_fipo.families.family import Layout, Weight
from megatron_fipo.model.mcore import full_precision


@dataclass(frozen=True)
class TensorInfo:
    """One tensor that `iterate_hf_tensors` will yield."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def describe_hf_tensors(model_chunks: Sequence[torch.nn.Module]) -> list[TensorInfo]:
    """What `iterate_hf_tensors` yields, in its order, without communication; the same list on every rank."""
    model = map_model(model_chunks)
    dtype = next(iter(model.parameters.values())).dtype
    return [TensorInfo(name, dtype, shape) for name, shape in _shapes(model).items()]


@torch.no_grad()
def iterate_hf_tensors(
    model_chunks: Sequence[torch.nn.Module], *, to_host: bool = True
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Every Hugging Face tensor of the model, one at a time, as (name, full tensor) on global rank 0.

    Collective: all ranks iterate, to the end and in step; they see the same names in the same order, and None for the tensor.
    Tensors have the parameters' dtype and are on the CPU, or with `to_host` False on the parameters' device. FP8 ones have their
    nominal bf16, which holds the values exactly where scales are powers of two (blockwise) and rounds them once more elsewhere. They
    may share memory with parameters: read them, before the next update. Where embeddings are tied there is no `lm_head.weight`.

    Communication is within data-parallel and context-parallel rank 0; the other replicas yield None at once. First one
    all_gather_object of parameter names over the pipeline group. Then for each of the model's parameters: one gather over the
    tensor-parallel group of the stage that holds it (the whole parameter arrives at its rank 0), and for stages other than the
    first one send of the whole to the first, which the stage's next gather overlaps.

    Memory beyond the model, P being the largest parameter (query, key and value count as one, and so do gate and up): at most
    3 P on the device of a stage's tensor-parallel rank 0 (shards, whole, parts), one P more where a send is under way, and P on
    the host of global rank 0 for what it yields. The other ranks hold nothing beyond their shard.
    """
    model = map_model(model_chunks)
    speaking = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    owners = _owners(model) if speaking else {}
    sending: list[tuple[dist.Work, torch.Tensor]] = []
    for weight in model.weights:
        parts = _collect(weight, model, owners[weight.megatron], sending) if speaking else None
        for index, name in enumerate(weight.names):
            yield name, None if parts is None else parts[index].cpu() if to_host else parts[index]
        del parts
    _finish(sending)


def save_hf(
    model_chunks: Sequence[torch.nn.Module],
    source_folder: str | Path,
    target_folder: str | Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the model as a Hugging Face folder: safetensors of at most 4 GB, config, tokenizer, generation config, chat template.

    All but the weights is copied from `source_folder`. `dtype` None keeps the parameters' dtype. The folder appears under
    its name only when it is complete. Collective, with the communication of `iterate_hf_tensors` and two small broadcasts;
    global rank 0 writes each tensor as it comes.
    UserError on every rank if the target exists or cannot be written (disk full); then nothing is left behind.
    """
    model = map_model(model_chunks)
    writer, problem = None, None
    if dist.get_rank() == 0:
        sizes = _shapes(model)
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


def _shapes(model: ModelMap) -> dict[str, tuple[int, ...]]:
    """Shape of each Hugging Face tensor, in export order."""
    return {
        name: shape
        for weight in model.weights
        for name, shape in zip(weight.names, weight.shapes, strict=True)
    }


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


def _collect(
    weight: Weight, model: ModelMap, owner: int, sending: list[tuple[dist.Work, torch.Tensor]]
) -> list[torch.Tensor] | None:
    """The whole parts of one weight on the first stage's tensor-parallel rank 0; None on the other ranks.

    `sending` is what this rank has under way to the first stage: the parts of at most one weight.
    """
    stage, tp_rank = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    parts = None
    if stage == owner:
        shards = _gather(full_precision(model.parameters[weight.megatron]), weight.layout)
        parts = join(weight, shards, model.architecture) if tp_rank == 0 else None
    if owner == 0 or tp_rank != 0 or stage not in (0, owner):
        return parts
    group = parallel_state.get_pipeline_model_parallel_group()
    if stage == owner:
        assert parts is not None
        _finish(sending)
        for part in parts:
            whole = part.contiguous()
            work = dist.isend(whole, dist.get_global_rank(group, 0), group=group)
            assert work is not None  # it is None outside the group only
            sending.append((work, whole))
        return None
    like = next(iter(model.parameters.values()))
    received = [torch.empty(shape, dtype=like.dtype, device=like.device) for shape in weight.shapes]
    for part in received:
        dist.recv(part, dist.get_global_rank(group, owner), group=group)
    return received


def _finish(sending: list[tuple[dist.Work, torch.Tensor]]) -> None:
    """Wait until the sends are done and let go of their tensors.

    On a GPU `wait` only orders streams. Without the synchronisation this rank would run ahead of the first stage and hold its
    whole stage, parameter by parameter.
    """
    for work, tensor in sending:
        work.wait()
        if tensor.is_cuda:
            torch.cuda.current_stream(tensor.device).synchronize()
    sending.clear()


def _gather(shard: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
    """All shards of a parameter on tensor-parallel rank 0, an empty list on the others. Replicated ones need no gather."""
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1 or layout is Layout.REPLICATED:
        return [shard]
    receives = group.rank() == 0
    shards = [torch.empty_like(shard) for _ in range(group.size())] if receives else []
    dist.gather(
        shard.contiguous(), shards if receives else None, dst=dist.get_global_rank(group, 0), group=group
    )
    return shards
