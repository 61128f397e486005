"""Room for actors that belong together: the trainer's ranks, or the rollout engines."""

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from megatron_fipo.errors import UserError

PLACEMENT_TIMEOUT_S = 60.0
"""Seconds in which Ray has to find the room."""


def reserve(bundle: dict[str, int], size: int, actors: str, mend: str) -> PlacementGroup:
    """Reserve `size` bundles, on as few nodes as possible. Raises `UserError`, which names `actors` and `mend`, without room."""
    placement = placement_group([bundle] * size, strategy="PACK")
    try:
        ray.get(placement.ready(), timeout=PLACEMENT_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError:
        remove_placement_group(placement)
        raise UserError(
            f"Ray found no room for {size} {actors} ({bundle} each) within {PLACEMENT_TIMEOUT_S:g} s; {mend} or add nodes"
        ) from None
    return placement


def node_by_node(placement: PlacementGroup) -> list[int]:
    """Bundle indices ordered so that neighbours share a node: tensor-parallel ranks are consecutive and talk the most."""
    nodes = placement_group_table(placement)["bundles_to_node_id"]
    return sorted(nodes, key=lambda bundle: (nodes[bundle], bundle))
