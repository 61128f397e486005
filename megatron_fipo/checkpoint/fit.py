"""Whether a distributed checkpoint is of the model that is to be loaded from it, before anything changes."""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint.api import CheckpointException

from megatron_fipo.checkpoint.plain_pickles import INDEX_FILE
from megatron_fipo.checkpoint.rank_errors import join_by_rank, one_line
from megatron_fipo.checkpoint.safetensors_folder import listing
from megatron_fipo.errors import UserError
from megatron_fipo.model.mcore import COMMON_STATE_FILE

_OPTIMIZER, _ROUTER = "optimizer.", ".mlp.router."
"""Parts of keys."""


def check_fit(architecture: dict[str, Any], state: dict[str, Any], folder: Path) -> None:
    """UserError on every rank if the checkpoint cannot be read or is not of this model.

    One gather of all tensors' names.
    """
    here, there, written, problem = _wanted_shapes(state), {}, {}, None
    try:
        written = (dist_checkpointing.load_content_metadata(str(folder)) or {})["architecture"]
        there = {
            item.key: tuple(item.global_shape)
            for item in dist_checkpointing.load_tensors_metadata(str(folder)).values()
        }
    except (Exception, CheckpointException) as error:  # unpickling a damaged index may raise any exception
        problem = one_line(error)
        if COMMON_STATE_FILE and (folder / INDEX_FILE).exists() and not (folder / COMMON_STATE_FILE).exists():
            problem = (
                f"it has no {COMMON_STATE_FILE}; if Megatron-Core 0.19 or later wrote it, "
                "only such a release can read it"
            )
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (problem, here))
    if unreadable := {rank: text for rank, (text, _) in enumerate(gathered) if text}:
        raise UserError(
            f"checkpoint {folder} cannot be read: {join_by_rank(unreadable)}; use another one, on a disk that "
            "all nodes share"
        )
    different = [
        f"{name} is {written.get(name)} there and {value} here"
        for name, value in architecture.items()
        if written.get(name) != value
    ]
    wanted = {key: shape for _, shapes in gathered for key, shape in shapes.items()}
    different += _different_tensors(wanted, there, "optimizer" in state)
    if different:
        more = f"; and {len(different) - 5} more differences" if len(different) > 5 else ""
        raise UserError(f"checkpoint {folder} does not fit this run: {'; '.join(different[:5])}{more}")


Shapes = dict[str, tuple[tuple[int, ...], bool]]
"""By key: a tensor's global shape, and whether its first dimension is a padded vocabulary (may differ)."""


def _different_tensors(
    wanted: Shapes, there: Mapping[str, tuple[int, ...]], with_optimizer: bool
) -> list[str]:
    """What the tensors of a checkpoint, by key, lack or have in another shape. Pure.

    Those of an optimizer may be left over without `with_optimizer`.
    """
    different = [
        f"{key} is {there[key]} there and {shape} here"
        for key, (shape, padded) in wanted.items()
        if key in there and there[key][padded:] != shape[padded:]
    ]
    surplus = {
        key for key in there.keys() - wanted.keys() if with_optimizer or not key.startswith(_OPTIMIZER)
    }
    absent = wanted.keys() - there.keys()
    routers = {key for key in absent | surplus if key.startswith(_OPTIMIZER) and _ROUTER in key}
    if routers:
        was = "false there and true" if routers & absent else "true there and false"
        different.append(f"model.router.trainable is {was} here, which a run cannot change")
    if absent := absent - routers:
        different.append(f"it lacks {listing(absent, limit=3)}")
    if surplus := surplus - routers:
        different.append(f"this model has no {listing(surplus, limit=3)}")
    return different


def _wanted_shapes(state: dict[str, Any]) -> Shapes:
    shapes = {}
    for value in nested_values(state):
        for item in nested_values([value.build()]) if isinstance(value, ShardedTensorFactory) else [value]:
            if isinstance(item, ShardedTensor):
                shapes[item.key] = (tuple(item.global_shape), bool(item.allow_shape_mismatch))
    return shapes
