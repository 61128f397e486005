"""Communication of a group of ranks: which links it uses, and how long an operation takes.

Megatron-Core's order of ranks is tensor, context, data, pipeline, the first fastest, and a node has consecutive ranks. A
group is described by its size and by the distance of neighbours. With 8 GPUs to a node and tensor 4:

    context group   distance 4   ranks 0, 4, 8, 12    2 of its ranks in each node
    data group      distance 4·cp                     1 of its ranks in each node if cp >= 2

A ring that leaves the node leaves it once for each of its ranks there, through that rank's own network adapter. So the bus
bandwidth of a group with g ranks to a node is g times a rank's share of the network, at most that of the node.

Ignored: other traffic at the same time, switches of the network, NCCL's choice of trees or in-switch reduction.
"""

from dataclasses import dataclass

from megatron_fipo.plan.case import Case
from megatron_fipo.plan.estimate import NOTHING, Estimate, latest
from megatron_fipo.plan.experts import expert_replicas
from megatron_fipo.plan.machine import Link, Machine


@dataclass(frozen=True)
class Group:
    """Ranks that communicate."""

    machine: Machine
    size: int
    distance: int = 1
    """Between neighbours, in ranks."""

    @property
    def per_node(self) -> int:
        """Ranks of the group in one node."""
        return max(1, min(self.size, self.machine.devices_per_node // self.distance))

    @property
    def in_node(self) -> bool:
        return self.per_node == self.size

    def gather(self, size: float) -> Estimate:
        """Seconds of an all-gather, or a reduce-scatter, of a tensor of `size` bytes in all."""
        if self.size == 1:
            return NOTHING
        steps = self.size - 1
        return self._bus(size * steps / self.size) + self._latency(steps)

    def reduce(self, size: float) -> Estimate:
        """Seconds of an all-reduce of `size` bytes on every rank: a reduce-scatter and an all-gather."""
        return self.gather(size).scaled(2.0)

    def small_reduce(self, size: float) -> Estimate:
        """Seconds of an all-reduce that sends once to all and adds what arrives, as inference engines do for few bytes."""
        if self.size == 1:
            return NOTHING
        return self._bus(2 * size * (self.size - 1) / self.size) + self._latency(2)

    def exchange(self, size: float) -> Estimate:
        """Seconds of an all-to-all in which every rank sends `size` bytes in all, its own share included.

        Bytes for other nodes pass the rank's share of the network while the others pass the node's links.
        """
        if self.size == 1:
            return NOTHING
        inside = size * (self.per_node - 1) / self.size
        outside = size * (self.size - self.per_node) / self.size
        machine = self.machine
        times = machine.node.rate.seconds(inside, "node"), machine.network.rate.seconds(outside, "network")
        return latest(times[0] if inside else NOTHING, times[1] if outside else NOTHING) + self._latency(1)

    def send(self, size: float) -> Estimate:
        """Seconds in which each rank sends `size` bytes to its neighbour. The slowest pair counts."""
        if self.size == 1:
            return NOTHING
        link, name = self._slowest()
        return link.rate.seconds(size, name) + self._latency(1)

    def _slowest(self) -> tuple[Link, str]:
        return (self.machine.node, "node") if self.in_node else (self.machine.network, "network")

    def _bus(self, size: float) -> Estimate:
        inside = self.machine.node.rate.seconds(size, "node")
        if self.in_node:
            return inside
        return latest(inside, self.machine.network.rate.seconds(size / self.per_node, "network"))

    def _latency(self, steps: int) -> Estimate:
        link, name = self._slowest()
        return link.latency.times(steps, f"{name} latency")


def tensor_group(case: Case) -> Group:
    return Group(case.machine, case.config.parallel.tensor_model_parallel_size)


def context_group(case: Case) -> Group:
    parallel = case.config.parallel
    return Group(case.machine, parallel.context_parallel_size, parallel.tensor_model_parallel_size)


def replica_group(case: Case) -> Group:
    """Ranks with the same shard of the model: data- and context-parallel ones."""
    parallel = case.config.parallel
    return Group(
        case.machine,
        parallel.data_parallel_size * parallel.context_parallel_size,
        parallel.tensor_model_parallel_size,
    )


def pipeline_group(case: Case) -> Group:
    parallel = case.config.parallel
    return Group(
        case.machine,
        parallel.pipeline_model_parallel_size,
        parallel.world_size // parallel.pipeline_model_parallel_size,
    )


def expert_group(case: Case) -> Group:
    """Ranks that share the experts of a layer, each some of them. The ranks that share a matrix of an expert are beside each
    other."""
    parallel = case.config.parallel
    return Group(case.machine, parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size)


def expert_tensor_group(case: Case) -> Group:
    """Ranks that share each matrix of an expert."""
    return Group(case.machine, case.config.parallel.expert_tensor_parallel_size)


def expert_replica_group(case: Case) -> Group:
    """Ranks of a pipeline stage with the same shard of the experts."""
    parallel = case.config.parallel
    ways = parallel.expert_tensor_parallel_size * parallel.expert_model_parallel_size
    return Group(case.machine, expert_replicas(parallel), ways)


def engine_group(case: Case) -> Group:
    return Group(case.machine, case.config.rollout.engine_tensor_parallel_size)
