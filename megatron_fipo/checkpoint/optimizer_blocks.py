"""The distributed optimizer's state in a checkpoint: each rank stores the part that it has, without a gather.

The distributed optimizer keeps a contiguous range of the elements of some parameters on each data × context
rank; of experts, which a second optimizer updates, on each expert-data-parallel rank. In row-major order such a
range of a matrix is at most three blocks: part of a row, complete rows, part of a row. Each block is one shard of
the complete tensor, under the name and with the global shape of
Megatron-Core's `fully_reshardable` format. So every layout reads the checkpoint, Megatron-Core's own reader
included, and this reader takes checkpoints that Megatron-Core's writer has gathered. (Megatron-Core's formats
without a gather do not suffice: `dp_reshardable` is bound to one TP × PP layout, and `fully_sharded_model_space`
needs flattened shards, which releases since 0.16 refuse to build.)
"""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer

DENSE, EXPERTS = "dense", "experts"
STATES = ("param", "exp_avg", "exp_avg_sq")
"""What Adam keeps of each parameter, in Megatron-Core's names."""


@dataclass(frozen=True)
class Block:
    """A rectangular part of a tensor whose elements are consecutive in row-major order."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]


def blocks(shape: tuple[int, ...], start: int, stop: int) -> list[Block]:
    """The elements `start` to `stop` (exclusive) of a row-major tensor, as consecutive blocks.

    At most 2 · dimensions - 1 of them. Without elements, none.
    """
    if start >= stop:
        return []
    if len(shape) == 1:
        return [Block((start,), (stop - start,))]
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:
        return _in_row(shape, last, start - last * row, stop - last * row)
    head = _in_row(shape, first - 1, start - (first - 1) * row, row) if start < first * row else []
    rows = [Block((first, *[0] * len(shape[1:])), (last - first, *shape[1:]))] if first < last else []
    return [*head, *rows, *_in_row(shape, last, 0, stop - last * row)]


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> list[Block]:
    """Elements of one row of the first dimension."""
    return [Block((row, *block.offset), (1, *block.shape)) for block in blocks(shape[1:], start, stop)]


def distributed_parts(optimizer: MegatronOptimizer) -> dict[str, DistributedOptimizer]:
    """The distributed optimizers of a rank, by what they update: `dense`, and `experts` if the model has some.

    Every rank has the same parts; that of experts is empty in a stage without experts. Empty if the optimizer is not
    distributed.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    if not all(isinstance(part, DistributedOptimizer) for part in parts):
        return {}
    return {EXPERTS if _updates_experts(part) else DENSE: part for part in parts}


def _updates_experts(part: DistributedOptimizer) -> bool:
    return any(group["is_expert_parallel"] for group in part.param_groups)


def sharded_optimizer_state(
    parts: Mapping[str, DistributedOptimizer], model_state: dict[str, Any], is_loading: bool
) -> dict[str, Any]:
    """Megatron-Core's sharded state of this rank's parts, for saving and for loading in place.

    `model_state` is the sharded state of the model, with its parameters as data. Weights and moments are
    float32. Data are views of the optimizer's tensors; a state of another dtype is converted (4 bytes per
    element of this rank, for a moment), and pinned host memory is copied for saving. No collectives.
    """
    shardings = {id(item.data): item for item in nested_values(model_state)}
    parameters: dict[str, dict[str, Any]] = {}
    for name, part in parts.items():
        for index, (parameter, start, tensors) in enumerate(_slices(part)):
            sharding = shardings[id(parameter)]
            flat = {state: tensors[state].detach().float() for state in STATES}
            stored = {
                "blocks": {state: _sharded_blocks(sharding, state, start, flat[state]) for state in STATES},
                "flat": {state: LocalNonpersistentObject(tensor) for state, tensor in flat.items()},
            }
            if not is_loading:
                _copy_pinned(stored["blocks"])
            parameters[f"{name}.{index}"] = stored
    # The hyperparameters and the number of steps are those of all parts, and every rank has a dense one.
    return {
        **parts[DENSE].state_dict(),
        "param_state": parameters,
        "param_state_sharding_type": "fully_reshardable",
    }


def loadable_optimizer_state(part: DistributedOptimizer, loaded: dict[str, Any], name: str) -> dict[str, Any]:
    """What `part.load_state_dict` takes, from a loaded `sharded_optimizer_state`."""
    states = [state for key, state in loaded["param_state"].items() if key.startswith(f"{name}.")]
    parameters = {
        index: {"fp32_param" if state == "param" else state: flat for state, flat in stored["flat"].items()}
        for index, stored in enumerate(states)
    }
    common = {key: value for key, value in loaded.items() if not key.startswith("param_state")}
    if name != DENSE:
        common = _with_steps(part.state_dict(), common)
    # Megatron-Core's name for flat ranges in the order of `_slices`.
    return {**common, "param_state": parameters, "param_state_sharding_type": "fully_sharded_model_space"}


def _with_steps(own: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    """The state of a part with the number of steps that the dense part has taken (none before the first)."""
    steps = {key: value for key, value in dense["optimizer"]["param_groups"][0].items() if key == "step"}
    for group in own["optimizer"]["param_groups"]:
        group.pop("step", None)
        group.update(steps)
    return own


def _slices(
    optimizer: DistributedOptimizer,
) -> Iterator[tuple[torch.nn.Parameter, int, dict[str, torch.Tensor]]]:
    """Each parameter of which this rank has elements, the first of them, and its state ([elements] each)."""
    state = optimizer.get_parameter_state_dp_reshardable()
    for index, ranges in enumerate(optimizer.gbuf_ranges):
        for dtype, buckets in ranges.items():
            for bucket, tensors_of_bucket in zip(buckets, state[index][dtype], strict=True):
                entries = bucket["param_map"].items()
                for (parameter, place), tensors in zip(entries, tensors_of_bucket, strict=True):
                    yield parameter, place["param"].start, tensors


def _sharded_blocks(
    sharding: ShardedTensor | ShardedTensorFactory, name: str, start: int, flat: torch.Tensor
) -> list[ShardedTensor]:
    """A flat range of a parameter, from its element `start`, as shards of the complete tensors."""
    sharded, stop = [], start + flat.numel()
    for begin, part in _parts(sharding):
        shape, axes = part.local_shape, part.prepend_axis_num
        position = max(start, begin)
        for block in blocks(shape, position - begin, min(stop - begin, prod(shape))):
            size = prod(block.shape)
            local = (*[1] * axes, *block.shape)
            place = zip(part.global_offset, (*[0] * axes, *block.offset), strict=True)
            data = flat[position - start : position - start + size].view(local)
            sharded.append(
                ShardedTensor(
                    key=f"optimizer.state.{name}.{part.key}",
                    data=data,
                    dtype=data.dtype,
                    local_shape=local,
                    global_shape=part.global_shape,
                    global_offset=tuple(map(sum, place)),
                    axis_fragmentations=None,  # not a regular grid
                    # One of the data × context ranks has it. The other two numbers are those of the parameter.
                    replica_id=(*part.replica_id[:2], 0),
                    allow_shape_mismatch=part.allow_shape_mismatch,
                )
            )
            position += size
    return sharded


def _copy_pinned(sharded: dict[str, list[ShardedTensor]]) -> None:
    """Replace data in pinned memory, in place.

    CUDA maps it, so a forked writer may not have a snapshot of it.
    """
    for block in (block for parts in sharded.values() for block in parts):
        if block.data is not None and block.data.is_pinned():
            block.data = block.data.clone()


def _parts(sharding: ShardedTensor | ShardedTensorFactory) -> list[tuple[int, ShardedTensor]]:
    """The tensors that a checkpoint has of a parameter, each with its first element in the parameter.

    More than one if a factory divides it (gate and up projection).
    """
    if isinstance(sharding, ShardedTensor):
        return [(0, sharding)]
    built = replace(sharding, data=torch.empty(sharding.data.shape, device="meta")).build()
    parts = [(part.data.storage_offset(), part) for part in nested_values(built)]
    if not all(part.data.is_contiguous() for _, part in parts):
        raise ValueError(f"{sharding.key} is divided in a checkpoint into parts that are not contiguous")
    return parts
