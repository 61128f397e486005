"""Ray placement of actors that belong together: the trainer's ranks, or the rollout engines."""

from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from megatron_fipo.driver.ray_wait import wait_for_one
from megatron_fipo.errors import UserError

PLACEMENT_TIMEOUT_S = 60.0
"""Seconds in which Ray must find the resources."""


def reserve(bundle: dict[str, int], size: int, actors: str, fix: str) -> PlacementGroup:
    """Reserve `size` bundles, on as few nodes as possible. Raises `UserError`, with `actors` and `fix`, if none are free."""
    placement = placement_group([bundle] * size, strategy="PACK")
    if not wait_for_one([placement.ready()], PLACEMENT_TIMEOUT_S):
        remove_placement_group(placement)
        raise UserError(
            f"Ray has no free resources for {size} {actors} ({bundle} each) within {PLACEMENT_TIMEOUT_S:g} s; {fix} or add nodes"
        )
    return placement


def node_by_node(placement: PlacementGroup) -> list[int]:
    """Bundle indices ordered so that neighbors share a node: tensor-parallel ranks are consecutive and communicate the most."""
    nodes = placement_group_table(placement)["bundles_to_node_id"]
    return sorted(nodes, key=lambda bundle: (nodes[bundle], bundle))
