"""Weights and optimizer state as a Megatron-Core distributed checkpoint (`torch_dist` format).

The files are independent of the parallel layout that wrote them, and carry the same names on CPU and GPU. Which folder a
checkpoint lives in, and when it counts as complete, is the caller's business (`trainer/state.py`).
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch.distributed.checkpoint.api import CheckpointException

from megatron_fipo.errors import UserError


def _sharded_state(modules: list[Any], optimizer: MegatronOptimizer, is_loading: bool) -> dict[str, Any]:
    names = ["model"] if len(modules) == 1 else [f"model{index}" for index in range(len(modules))]
    metadata = ensure_metadata_has_dp_cp_group({"distrib_optim_sharding_type": "fully_reshardable"})
    state = {name: module.sharded_state_dict(metadata=metadata) for name, module in zip(names, modules, strict=True)}
    state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    return state


def save_checkpoint(modules: list[torch.nn.Module], optimizer: MegatronOptimizer, folder: Path) -> None:
    """Write into an existing empty folder. Collective over all ranks; each rank writes what it alone holds.

    The optimizer must have taken a step: before that it has no state. UserError on every rank where a file can't be written.
    """
    try:
        dist_checkpointing.save(_sharded_state(modules, optimizer, is_loading=False), str(folder))
    except CheckpointException as error:
        # Not an Exception by its class, so it would take the whole process down.
        free = shutil.disk_usage(folder).free // 2**20
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(
            f"cannot write the checkpoint {folder} ({free} MiB free): {reason}; make room, then run the same command to go on "
            "from the checkpoint before"
        ) from None


def load_checkpoint(modules: list[torch.nn.Module], optimizer: MegatronOptimizer, folder: Path) -> None:
    """Read weights and optimizer state back in place, whatever layout wrote them. Collective over all ranks."""
    loaded = dist_checkpointing.load(_sharded_state(modules, optimizer, is_loading=True), str(folder))
    names = ["model"] if len(modules) == 1 else [f"model{index}" for index in range(len(modules))]
    for name, module in zip(names, modules, strict=True):
        module.load_state_dict(loaded[name])
    with torch.no_grad():
        optimizer.load_state_dict(loaded["optimizer"])
