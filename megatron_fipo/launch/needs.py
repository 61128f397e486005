"""What a configuration needs of a job's nodes. Pure."""

import math
from dataclasses import dataclass

from megatron_fipo.config import Config, with_placement
from megatron_fipo.config.placement import engine_gpus
from megatron_fipo.errors import UserError


@dataclass(frozen=True)
class Allocation:
    """The nodes of a job."""

    nodes: int
    gpus_per_node: int
    """0 for ranks and engines on CPUs."""
    cpus_per_node: int | None
    """None if it is not known before the job starts."""


def check_allocation(config: Config, allocation: Allocation) -> None:
    """Raise UserError if the trainer's ranks and the engines of `config` do not fit the allocation.

    On GPUs each rank and each rank of an engine takes one, unless engines are colocated with the trainer. On CPUs each rank
    and each engine takes one.
    """
    gpus = allocation.gpus_per_node
    colocated = with_placement(config, allocation.nodes * gpus).rollout.colocated
    ranks, engines = config.parallel.world_size, 0 if colocated else config.rollout.num_engines
    if gpus:
        _check("GPUs", ranks, 0 if colocated else engine_gpus(config), allocation.nodes, gpus)
    if allocation.cpus_per_node is not None:
        _check("CPUs", ranks, engines, allocation.nodes, allocation.cpus_per_node)


def _check(kind: str, ranks: int, engines: int, nodes: int, per_node: int) -> None:
    needed = ranks + engines
    if needed > nodes * per_node:
        raise UserError(
            f"the run needs {needed:,} {kind} ({ranks:,} for the ranks of `parallel`, {engines:,} for the engines of `rollout`), but "
            f"{nodes:,} node{'s' if nodes > 1 else ''} of {per_node:,} have {nodes * per_node:,}; use at least "
            f"{math.ceil(needed / per_node):,} nodes, or lower the sizes"
        )
