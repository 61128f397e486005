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
    return [
        TensorInfo(name, dtype, shape)
        for group in _gathered_together(model)
        for weight in group
        for name, shape in zip(weight.names, weight.shapes, strict=True)
    ]


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

    Communication is within data-parallel and context-parallel rank 0, for experts within expert-data-parallel rank 0; the
    other replicas yield None immediately. First one all_gather_object of parameter names over the pipeline group. Then, for
    each parameter of the model: one gather over the tensor-parallel group of its stage, for experts one gather of an expert of
    each expert-parallel rank over the expert-tensor × expert group (the complete parameters arrive at the first rank of the
    stage). If the stage is not the first, also one send of the complete parameters to the first stage, overlapped with the
    stage's next gather.

    Memory beyond the model, with P the largest parameter (query, key and value count as one, gate and up too, and so does
    an expert of each expert-parallel rank): at most 3 P on the device of a stage's first rank (shards, complete parameter,
    its tensors), one P more while a send is in flight, and P on the host of global rank 0 for the yielded tensors. The
    other ranks need none.
    """
    model = map_model(model_chunks)
    stages = _first_stages(model) if _is_replica_0(expert=False) or _is_replica_0(expert=True) else {}
    sending: list[tuple[dist.Work, torch.Tensor]] = []
    for group in _gathered_together(model):
        participates = _is_replica_0(expert=group[0].expert is not None)
        tensors = _collect(group, model, stages, sending) if participates else None
        progress.advance()
        for index, name in enumerate(name for weight in group for name in weight.names):
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


def _is_replica_0(expert: bool) -> bool:
    """Whether this rank is of the first replica of the weights: of experts, or of all others."""
    if expert:
        return parallel_state.get_expert_data_parallel_rank() == 0
    return parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0


def _gathered_together(model: ModelMap) -> list[list[Weight]]:
    """The weights of the model in the order of the export: one outside experts, of experts one of each expert-parallel rank.

    Example: 4 experts on 2 ranks give [0, 2] and [1, 3]: the first of each rank, then the second.
    """
    ranks, experts = parallel_state.get_expert_model_parallel_world_size(), model.architecture.experts
    groups: dict[str, list[Weight]] = {}
    for weight in model.weights:
        first = weight.megatron
        if weight.expert is not None and experts is not None:
            slot = weight.expert % (experts.count // ranks)
            first = first.replace(f".local_experts.{weight.expert}.", f".local_experts.{slot}.")
        groups.setdefault(first, []).append(weight)
    return list(groups.values())


def _collect(
    group: Sequence[Weight],
    model: ModelMap,
    stages: dict[str, int],
    sending: list[tuple[dist.Work, torch.Tensor]],
) -> list[torch.Tensor] | None:
    """The complete Hugging Face tensors of weights that are gathered together, on global rank 0; else None.

    `stages` has the stage of each parameter. `sending` are this rank's sends to the first stage: the tensors of at most one
    group.
    """
    own = group[parallel_state.get_expert_model_parallel_rank()] if group[0].expert is not None else group[0]
    stage, owner = parallel_state.get_pipeline_model_parallel_rank(), stages[own.megatron]
    is_first = parallel_state.get_tensor_model_parallel_rank() == 0 and _is_replica_0(expert=False)
    tensors = None
    if stage == owner:
        shards = _gather(full_precision(model.parameters[own.megatron]), own)
        tensors = _join_all(group, shards, model) if is_first else None
    if owner == 0 or not is_first or stage not in (0, owner):
        return tensors
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    if stage == owner:
        assert tensors is not None
        _finish(sending)
        for tensor in tensors:
            contiguous = tensor.contiguous()
            work = dist.isend(contiguous, dist.get_global_rank(pipeline, 0), group=pipeline)
            assert work is not None  # None only outside the group
            sending.append((work, contiguous))
        return None
    like = next(iter(model.parameters.values()))
    shapes = [shape for weight in group for shape in weight.shapes]
    received = [torch.empty(shape, dtype=like.dtype, device=like.device) for shape in shapes]
    for tensor in received:
        dist.recv(tensor, dist.get_global_rank(pipeline, owner), group=pipeline)
    return received


def _join_all(group: Sequence[Weight], shards: Sequence[torch.Tensor], model: ModelMap) -> list[torch.Tensor]:
    """The Hugging Face tensors of each weight in turn. Of experts, the shards are ordered by expert rank, then by tensor rank."""
    size = len(shards) // len(group)
    return [
        tensor
        for index, weight in enumerate(group)
        for tensor in join(weight, shards[index * size : (index + 1) * size], model.architecture)
    ]


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


def _gather(shard: torch.Tensor, weight: Weight) -> list[torch.Tensor]:
    """All shards of a parameter, or of one expert of each rank, on the first rank of the stage; an empty list elsewhere.

    Replicated ones need no gather.
    """
    if weight.layout is Layout.REPLICATED:
        return [shard]
    group = (
        parallel_state.get_tensor_model_parallel_group()
        if weight.expert is None
        else parallel_state.get_expert_tensor_and_model_parallel_group()
    )
    if group.size() == 1:
        return [shard]
    receives = group.rank() == 0
    shards = [torch.empty_like(shard) for _ in range(group.size())] if receives else []
    dist.gather(
        shard.contiguous(), shards if receives else None, dst=dist.get_global_rank(group, 0), group=group
    )
    return shards
