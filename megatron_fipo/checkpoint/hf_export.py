"""Megatron-Core model chunks as Hugging Face tensors: as a stream, or written to a folder."""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_fipo import progress
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
    """The tensors that `iterate_hf_tensors` yields, in order: no communication, the same on every rank."""
    model = map_model(model_chunks)
    dtype = next(iter(model.parameters.values())).dtype
    return [TensorInfo(name, dtype, shape) for name, shape in _shapes(model).items()]


@torch.no_grad()
def iterate_hf_tensors(
    model_chunks: Sequence[torch.nn.Module], *, to_host: bool = True
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Every Hugging Face tensor of the model, one at a time, as (name, full tensor) on global rank 0.

    Collective: all ranks iterate to the end, in step. All see the same names in the same order, and other
    ranks get None for the tensor. Tensors have the parameters' dtype and are on the CPU, or on the
    parameters' device if `to_host` is False. FP8 tensors have their nominal bf16, which represents the values
    exactly if scales are powers of two (blockwise) and rounds them once more otherwise. Tensors may share
    memory with parameters: use them read-only and before the next update. If embeddings are tied there is no
    `lm_head.weight`.

    Communication is within data-parallel and context-parallel rank 0; the other replicas yield None
    immediately. First one all_gather_object of parameter names over the pipeline group. Then, for each
    parameter of the model: one gather over the tensor-parallel group of its stage (the complete parameter
    arrives at tensor-parallel rank 0). If the stage is not the first, also one send of the complete parameter
    to the first stage, overlapped with the stage's next gather.

    Memory beyond the model, with P the largest parameter (query, key and value count as one, and so do gate
    and up): at most 3 P on the device of a stage's tensor-parallel rank 0 (shards, complete parameter, its
    tensors), one P more while a send is in flight, and P on the host of global rank 0 for the yielded
    tensors. The other ranks need none.
    """
    model = map_model(model_chunks)
    participates = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    stages = _first_stages(model) if participates else {}
    sending: list[tuple[dist.Work, torch.Tensor]] = []
    for weight in model.weights:
        tensors = _collect(weight, model, stages[weight.megatron], sending) if participates else None
        progress.advance()
        for index, name in enumerate(weight.names):
            yield name, None if tensors is None else tensors[index].cpu() if to_host else tensors[index]
        del tensors
    _finish(sending)


def save_hf(
    model_chunks: Sequence[torch.nn.Module],
    source_folder: str | Path,
    target_folder: str | Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the model as a Hugging Face folder.

    That is safetensors of at most 4 GB, config, tokenizer, generation config and chat template. All files
    except the weights are copied from `source_folder`. `dtype` None keeps the parameters' dtype. The folder
    appears under its name only when it is complete. Collective, with the communication of
    `iterate_hf_tensors` and two small broadcasts. Global rank 0 writes each tensor as it arrives. UserError
    on every rank if the target exists or cannot be written (disk full); no files remain in that case.
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
                # The other ranks are still sending: receive everything before the error is broadcast.
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


def _first_stages(model: ModelMap) -> dict[str, int]:
    """The first pipeline stage that has each parameter, by name."""
    group = parallel_state.get_pipeline_model_parallel_group()
    names: list[list[str]] = [[] for _ in range(group.size())]
    dist.all_gather_object(names, list(model.parameters), group=group)
    return {name: stage for stage in reversed(range(len(names))) for name in names[stage]}


def _collect(
    weight: Weight, model: ModelMap, owner: int, sending: list[tuple[dist.Work, torch.Tensor]]
) -> list[torch.Tensor] | None:
    """One weight's complete Hugging Face tensors, on tensor-parallel rank 0 of the first stage; else None.

    `owner` is the weight's stage. `sending` are this rank's sends to the first stage: the tensors of at most
    one weight.
    """
    stage = parallel_state.get_pipeline_model_parallel_rank()
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    tensors = None
    if stage == owner:
        shards = _gather(full_precision(model.parameters[weight.megatron]), weight.layout)
        tensors = join(weight, shards, model.architecture) if tp_rank == 0 else None
    if owner == 0 or tp_rank != 0 or stage not in (0, owner):
        return tensors
    group = parallel_state.get_pipeline_model_parallel_group()
    if stage == owner:
        assert tensors is not None
        _finish(sending)
        for tensor in tensors:
            contiguous = tensor.contiguous()
            work = dist.isend(contiguous, dist.get_global_rank(group, 0), group=group)
            assert work is not None  # None only outside the group
            sending.append((work, contiguous))
        return None
    like = next(iter(model.parameters.values()))
    received = [torch.empty(shape, dtype=like.dtype, device=like.device) for shape in weight.shapes]
    for tensor in received:
        dist.recv(tensor, dist.get_global_rank(group, owner), group=group)
    return received


def _finish(sending: list[tuple[dist.Work, torch.Tensor]]) -> None:
    """Wait until the sends are complete and release their tensors.

    On a GPU `wait` only orders streams. Without the synchronization this rank would not wait for the first
    stage and would hold all parameters of its stage.
    """
    for work, tensor in sending:
        work.wait()
        if tensor.is_cuda:
            torch.cuda.current_stream(tensor.device).synchronize()
    sending.clear()


def _gather(shard: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
    """All shards of a parameter on tensor-parallel rank 0, an empty list elsewhere.

    Replicated ones need no gather.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1 or layout is Layout.REPLICATED:
        return [shard]
    receives = group.rank() == 0
    shards = [torch.empty_like(shard) for _ in range(group.size())] if receives else []
    dist.gather(
        shard.contiguous(), shards if receives else None, dst=dist.get_global_rank(group, 0), group=group
    )
    return shards
