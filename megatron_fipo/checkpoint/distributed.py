"""Weights and optimizer state as a Megatron-Core distributed checkpoint (`torch_dist` format).

The files are independent of the parallel layout that wrote them, and carry the same names on CPU and GPU. Which folder a
checkpoint lives in, and when it counts as complete, is the caller's business (`trainer/state.py`).
"""

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group


def _sharded_state(modules: list[Any], optimizer: MegatronOptimizer, is_loading: bool) -> dict[str, Any]:
    names = ["model"] if len(modules) == 1 else [f"model{index}" for index in range(len(modules))]
    metadata = ensure_metadata_has_dp_cp_group({"distrib_optim_sharding_type": "fully_reshardable"})
    state = {name: module.sharded_state_dict(metadata=metadata) for name, module in zip(names, modules, strict=True)}
    state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    return state


def save_checkpoint(modules: list[torch.nn.Module], optimizer: MegatronOptimizer, folder: Path) -> None:
    """Write into an existing empty folder. Collective over all ranks; each rank writes what it alone holds."""
    dist_checkpointing.save(_sharded_state(modules, optimizer, is_loading=False), str(folder))


def load_checkpoint(modules: list[torch.nn.Module], optimizer: MegatronOptimizer, folder: Path) -> None:
    """Read weights and optimizer state back in place, whatever layout wrote them. Collective over all ranks."""
    loaded = dist_checkpointing.load(_sharded_state(modules, optimizer, is_loading=True), str(folder))
    names = ["model"] if len(modules) == 1 else [f"model{index}" for index in range(len(modules))]
    for name, module in zip(names, modules, strict=True):
        module.load_state_dict(loaded[name])
    with torch.no_grad():
        optimizer.load_state_dict(loaded["optimizer"])
