"""The preflight of one node: measure, join the others over the head's store, measure together, hand over."""

import json
import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_fipo.errors import UserError
from megatron_fipo.node.preflight import canary
from megatron_fipo.node.preflight.allocation import Allocation
from megatron_fipo.node.preflight.children import Check
from megatron_fipo.node.preflight.facts import (
    ClockOffset,
    Link,
    Measurements,
    NetworkFacts,
    NodeFacts,
    from_json,
    to_json,
)
from megatron_fipo.node.preflight.limits import PreflightLimits
from megatron_fipo.node.preflight.measure import measure_node
from megatron_fipo.node.preflight.plan import Plan
from megatron_fipo.node.preflight.rendezvous import Store

CANARY_TIMEOUT_S = 10.0
GRACE_S = 10.0
"""Seconds for which nodes wait for each other beyond the time limits."""


@dataclass(frozen=True)
class Gathering:
    """What the head publishes once it knows which nodes have joined."""

    ranks: tuple[int, ...]
    """Those nodes, by their rank in the allocation."""
    gpus: bool
    """Whether they exchange between GPUs: all have some."""
    local_ranks: int
    """Processes per node for exchanges: the least number of GPUs on a node, at least 1."""
    token: str
    """Names the canary."""
    canary_failure: str | None
    """Why the head could not place it."""


@dataclass(frozen=True)
class Share:
    """What one node has found together with others."""

    network: NetworkFacts
    canary: str | None


def measure(allocation: Allocation, limits: PreflightLimits, folder: Path | None) -> Measurements | None:
    """Measure this node, and together with the others. Returns everything on the head, None on another node.

    `folder` is to be shared by all nodes. Raises `UserError` if the head and this node do not find each other.
    """
    start = time.monotonic()
    facts = measure_node(limits.dtype, limits.check_timeout_s)
    store = Store(allocation, limits.join_timeout_s)
    store.put(f"joined/{allocation.rank}", to_json(facts))
    if allocation.rank != 0:
        gathering = _await_gathering(allocation, limits, store)
        share = _take_part(allocation, gathering, limits, store, folder)
        store.put(f"done/{allocation.rank}", to_json(share))
        return None
    nodes = _gather_nodes(allocation, limits, store)
    gathering = _form_gathering(allocation, nodes, folder)
    store.put("gathering", to_json(gathering))
    exchanges_s = limits.exchange_time_s(len(gathering.ranks))
    deadline = time.monotonic() + CANARY_TIMEOUT_S + canary.GRACE_S + exchanges_s + GRACE_S
    store.put("done/0", to_json(_take_part(allocation, gathering, limits, store, folder)))
    keys = {f"done/{rank}": allocation.names[rank] for rank in gathering.ranks}
    done = store.gather(keys, deadline)
    shares = {keys[key]: from_json(Share, value) for key, value in done.items()}
    return Measurements(
        head=allocation.name,
        names=allocation.names,
        nodes=nodes,
        network={name: share.network for name, share in shares.items()},
        shared_folder=None if folder is None else str(folder),
        canary=_collect_canary(allocation, gathering, folder, shares),
        seconds=round(time.monotonic() - start, 1),
    )


def _gather_nodes(allocation: Allocation, limits: PreflightLimits, store: Store) -> dict[str, NodeFacts]:
    """What the nodes that join in time have measured, by name."""
    keys = {f"joined/{rank}": name for rank, name in enumerate(allocation.names)}
    joined = store.gather(keys, time.monotonic() + limits.join_timeout_s)
    return {name: from_json(NodeFacts, joined[key]) for key, name in keys.items() if key in joined}


def _form_gathering(allocation: Allocation, nodes: dict[str, NodeFacts], folder: Path | None) -> Gathering:
    gpus = min(len(facts.gpus.by_torch) if facts.gpus else 0 for facts in nodes.values())
    token, failure = secrets.token_hex(8), None
    if folder is not None:
        _, failure = canary.step("place", folder, token, CANARY_TIMEOUT_S)
    ranks = tuple(allocation.names.index(name) for name in nodes)
    return Gathering(ranks, gpus > 0, max(1, gpus), token, failure)


def _await_gathering(allocation: Allocation, limits: PreflightLimits, store: Store) -> Gathering:
    patience = limits.check_timeout_s + limits.join_timeout_s + CANARY_TIMEOUT_S + GRACE_S
    published = store.get("gathering", time.monotonic() + patience)
    if published is None:
        raise UserError(
            f"the head {allocation.names[0]} did not tell node {allocation.name} to begin in {patience:g} s; "
            "read its output"
        )
    gathering = from_json(Gathering, published)
    if allocation.rank not in gathering.ranks:
        raise UserError(
            f"node {allocation.name} answered after the head had stopped waiting for it; raise --join-timeout-s or "
            "find out why this node is slow to start"
        )
    return gathering


def _take_part(
    allocation: Allocation, gathering: Gathering, limits: PreflightLimits, store: Store, folder: Path | None
) -> Share:
    failure = gathering.canary_failure
    if folder is not None and failure is None:
        rank = str(allocation.rank)
        _, failure = canary.step("answer", folder, gathering.token, CANARY_TIMEOUT_S, rank)
    return Share(_measure_network(allocation, gathering, limits, store.port), failure)


def _measure_network(
    allocation: Allocation, gathering: Gathering, limits: PreflightLimits, port: int
) -> NetworkFacts:
    """Run the processes of this node that exchange with others, and join what they print."""
    deadline = time.monotonic() + limits.exchange_time_s(len(gathering.ranks))
    checks = []
    for local_rank in range(gathering.local_ranks):
        plan = Plan(
            address=allocation.address,
            port=port,
            names=tuple(allocation.names[rank] for rank in gathering.ranks),
            node=gathering.ranks.index(allocation.rank),
            local_rank=local_rank,
            local_ranks=gathering.local_ranks,
            gpus=gathering.gpus,
            timeout_s=limits.pair_timeout_s,
        )
        checks.append(Check("megatron_fipo.node.preflight.network", json.dumps(asdict(plan))))
    values: list[tuple[str, Any]] = []
    failures = []
    for check in checks:
        found, failure = check.results(deadline)
        values += found
        failures += [failure] if failure else []
    reduced = [value for kind, value in values if kind == "all_reduce_gb_per_s"]
    return NetworkFacts(
        links=tuple(from_json(Link, value) for kind, value in values if kind == "link"),
        clocks=tuple(from_json(ClockOffset, value) for kind, value in values if kind == "clock"),
        all_reduce_gb_per_s=min(reduced, default=None),
        failure=failures[0] if failures else None,
    )


def _collect_canary(
    allocation: Allocation, gathering: Gathering, folder: Path | None, shares: dict[str, Share]
) -> dict[str, str | None]:
    """By node: None if it and the head have read each other's file, else why not."""
    if folder is None:
        return {}
    if gathering.canary_failure is not None:
        return {allocation.name: gathering.canary_failure}
    found = {name: share.canary for name, share in shares.items()}
    ranks = [str(rank) for rank in gathering.ranks if found.get(allocation.names[rank], "") is None]
    unseen, failure = canary.step("collect", folder, gathering.token, CANARY_TIMEOUT_S, *ranks)
    for rank in ranks if failure else unseen:
        found[allocation.names[int(rank)]] = (
            failure or f"the head cannot read what it wrote there in {CANARY_TIMEOUT_S:g} s"
        )
    return found
