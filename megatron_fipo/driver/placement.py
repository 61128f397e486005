"""Ray placement of actors that belong together: the trainer's ranks, or the rollout engines."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import ray
from ray._private.state import available_resources_per_node
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from megatron_fipo.driver.cluster_loss import check_cluster
from megatron_fipo.driver.ray_wait import wait_for_one
from megatron_fipo.errors import LostError, UserError, listed


class NoSpareNodeError(LostError):
    """A node was lost and the cluster has no other: only more nodes would help."""


PLACEMENT_TIMEOUT_S = 60.0
"""Seconds in which a cluster that does not grow must find the resources."""
NOTE_AFTER_S = 15.0
"""Seconds after which the log says what Ray is waiting for."""
NAMED_NODES = 8
KINDS = {"GPU": "GPUs", "CPU": "CPUs"}
POLL_S = 1.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NodeResources:
    """What a node of the cluster has and what of that is free, by the names in `KINDS`."""

    address: str
    total: Mapping[str, float]
    free: Mapping[str, float]


def reserve(
    bundle: dict[str, int], size: int, actors: str, fix: str, timeout_s: float = PLACEMENT_TIMEOUT_S
) -> PlacementGroup:
    """Reserve `size` bundles, on as few nodes as possible; waits for resources that become free, and for nodes that join.

    Raises `UserError`, with `actors`, `fix` and what each node has, if they are not there after `timeout_s`.
    """
    placement = placement_group([bundle] * size, strategy="PACK")
    if wait_for_one([placement.ready()], min(NOTE_AFTER_S, timeout_s)):
        return placement
    if timeout_s > NOTE_AFTER_S:
        _logger.warning(
            "waiting up to %g s for the resources of %s", timeout_s, lacking(bundle, size, actors, nodes())
        )
        if wait_for_one([placement.ready()], timeout_s - NOTE_AFTER_S):
            return placement
    remove_placement_group(placement)
    raise UserError(
        f"Ray has no free resources for {lacking(bundle, size, actors, nodes())}, within {timeout_s:g} s "
        f"(placement_timeout_s); {fix} or add nodes"
    )


def nodes() -> list[NodeResources]:
    """The nodes of the cluster that are alive, by address."""
    free = available_resources_per_node()
    found = [
        NodeResources(node["NodeManagerAddress"], node["Resources"], free.get(node["NodeID"], {}))
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(found, key=lambda node: node.address)


def engine_bundles(gpus: int, nodes: Sequence[NodeResources]) -> list[dict[str, int]]:
    """The bundles of one engine: one of all its `gpus`, or one of each if no node has so many and the engine spans nodes."""
    if not gpus:
        return [{"CPU": 1}]
    most = max((int(node.total.get("GPU", 0)) for node in nodes), default=0)
    if gpus <= most:
        return [{"CPU": 1, "GPU": gpus}]
    return [{"CPU": 1, "GPU": 1}] * gpus


def lacking(bundle: Mapping[str, int], size: int, actors: str, nodes: Sequence[NodeResources]) -> str:
    """What is needed against what each node has, for a sentence."""
    kinds = [kind for kind in KINDS if kind in bundle]
    needed = " and ".join(
        f"{bundle[kind]:g} {KINDS[kind].removesuffix('s' if bundle[kind] == 1 else '')}" for kind in kinds
    )
    has = [
        f"{node.address} has "
        + " and ".join(
            f"{node.free.get(kind, 0):g} of {node.total.get(kind, 0):g} {KINDS[kind]}" for kind in kinds
        )
        + " free"
        for node in nodes
    ]
    return f"{size} {actors} of {needed} each ({listed(has, NAMED_NODES)})"


def wait_until_placed(placement: PlacementGroup, timeout_s: float, check: Callable[[], None]) -> None:
    """Wait until all bundles are on nodes: Ray moves those of a lost node to others that are free, once there are any.

    Calls `check`, which may raise, every second. Raises `NoSpareNodeError` after `timeout_s`.
    """
    until = time.monotonic() + timeout_s
    while placement_group_table(placement)["state"] != "CREATED":
        check_cluster()
        check()
        if time.monotonic() >= until:
            raise NoSpareNodeError(
                f"a node was lost, and no other had its resources within recovery.placement_timeout_s = {timeout_s:g} s; run the "
                "same command again, which resumes from the last checkpoint"
            )
        time.sleep(POLL_S)


def node_by_node(placement: PlacementGroup) -> list[int]:
    """Bundle indices ordered so that neighbors share a node: tensor-parallel ranks are consecutive and communicate the most."""
    nodes = placement_group_table(placement)["bundles_to_node_id"]
    return sorted(nodes, key=lambda bundle: (nodes[bundle], bundle))
