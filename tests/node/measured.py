"""Measurements of healthy nodes, for tests that change one of them."""

from dataclasses import replace
from itertools import combinations
from typing import Any

from megatron_fipo.node.preflight.facts import (
    ClockOffset,
    Gpu,
    Gpus,
    Link,
    Measurements,
    NetworkFacts,
    NodeFacts,
    ProcessLimits,
    Product,
    Space,
)

GPU = Gpu(0, "NVIDIA H100 80GB HBM3", 0, False, False)
FAST = 300.0
HEALTHY = NodeFacts(
    gpus=Gpus((GPU.name,) * 8, tuple(replace(GPU, index=index) for index in range(8)), None, ()),
    products=(Product("cuda:0", 4096**2, 0, 0, 700.0),),
    space=(Space("/tmp", 500.0), Space("/dev/shm", 900.0)),
    limits=ProcessLimits(65_536, 1_048_576, None, ("mlx5_0",)),
    versions={"Python": "3.12.3", "torch": "2.13.0", "source of megatron-fipo": "0123456789ab"},
)


def healthy(count: int) -> Measurements:
    """Nodes n0, n1, ... without a fault; n0 is the head."""
    names = tuple(f"n{index}" for index in range(count))
    return with_speeds(
        Measurements(
            head=names[0],
            names=names,
            nodes=dict.fromkeys(names, HEALTHY),
            network={},
            shared_folder="/shared/run",
            canary=dict.fromkeys(names),
        ),
        {},
    )


def with_speeds(found: Measurements, speeds: dict[tuple[str, str], float | str]) -> Measurements:
    """The same with these speeds of pairs in GB/s, or an error; all other pairs are fast."""
    links: dict[str, list[Link]] = {name: [] for name in found.names}
    for a, b in combinations(found.names, 2):
        speed = speeds.get((a, b), FAST)
        link = Link(a, b, 0, None, speed) if isinstance(speed, str) else Link(a, b, 0, speed)
        links[a].append(link)
        links[b].append(link)
    clocks = tuple(ClockOffset(name, 1e-4, 1e-5) for name in found.names[1:])
    network = {
        name: NetworkFacts(tuple(own), clocks if name == found.head else (), FAST)
        for name, own in links.items()
    }
    return replace(found, network=network)


def with_node(found: Measurements, name: str, **changes: Any) -> Measurements:
    """The same with other facts of one node."""
    return replace(found, nodes={**found.nodes, name: replace(found.nodes[name], **changes)})
