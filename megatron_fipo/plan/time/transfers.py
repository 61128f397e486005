"""Times of weight sync and of checkpoints: bytes over the links they pass.

Weights leave the trainer parameter by parameter (docs/weight-sync.md): an all-gather over tensor-parallel ranks, a send from
later pipeline stages to rank 0, then one NCCL broadcast to all workers, or with engines on the trainer's GPUs the host and
Ray's object store. The stages of this way overlap but for the first bucket, so the slowest one counts.

Ignored: Ray's calls, pausing and waking of engines.
"""

from megatron_fipo.plan.case import Case
from megatron_fipo.plan.estimate import NOTHING, Estimate, latest
from megatron_fipo.plan.experts import expert_count, expert_replicas
from megatron_fipo.plan.memory.state import BYTES_PER_ELEMENT
from megatron_fipo.plan.time.collectives import pipeline_group, tensor_group
from megatron_fipo.plan.time.layer import FUSED_RATE
from megatron_fipo.plan.time.optimizer import largest_shard
from megatron_fipo.plan.time.weights import model_weights

CHECKSUM_PASSES = 4
"""Times that the checksum reads or writes a tensor on a device; docs/weight-sync.md says "some", not measured."""

Rate = tuple[float, float, float]
"""Bytes per second: value, low, high."""
LOADING: Rate = (20e9, 4e9, 200e9)
"""Of an engine that loads tensors which arrive by NCCL. Low: verl's 14 to 18 s for a 32B model; high: 2 s for 470 GB."""
HOST_CHECKSUM: Rate = (6e9, 3e9, 12e9)
"""Of one thread; an engine that loads from the object store computes it in one (docs/weight-sync.md, another CPU)."""
HOST_COPY: Rate = (12e9, 6e9, 24e9)
"""Of one thread that copies in host memory: twice the checksum's rate (the same page)."""


def model_bytes(case: Case) -> float:
    """Of the complete model in `model.dtype`."""
    weights = model_weights(case)
    parameters = weights.ends + weights.dense + weights.expert * expert_count(case.architecture)
    return parameters * BYTES_PER_ELEMENT[case.config.model.dtype]


def sync_time(case: Case) -> Estimate:
    """Seconds in which every engine gets the weights."""
    size = model_bytes(case)
    stages = case.config.parallel.pipeline_model_parallel_size
    gather = tensor_group(case).gather(size)
    sent = size * (stages - 1) / stages
    collected = latest(gather, pipeline_group(case).send(sent) if stages > 1 else NOTHING)
    return latest(
        collected, _over_host(case, size) if case.sends_weights_over_host else _broadcast(case, size)
    )


def save_time(case: Case) -> Estimate:
    """Seconds that training waits for a checkpoint: every rank copies its part to host memory.

    Without `checkpoint.asynchronous`, the writing too.
    """
    copied = case.machine.host.rate.seconds(_own_bytes(case), "host")
    return copied if case.config.checkpoint.asynchronous else copied + write_time(case)


def write_time(case: Case) -> Estimate:
    """Seconds in which the nodes write a checkpoint to the file system."""
    ranks = min(case.machine.devices_per_node, case.trainer_devices)
    return case.machine.disk.seconds(_own_bytes(case) * ranks, "disk")


def _broadcast(case: Case, size: float) -> Estimate:
    """NCCL's pipelined broadcast passes every link once; workers in other nodes are reached over one adapter."""
    machine, every = case.machine, case.config.rollout.check_weight_sync
    seconds = machine.network.rate.seconds(size, "network") + _by(
        size, LOADING, "loading of weights by engines"
    )
    if every:
        checked = machine.memory.seconds(size * CHECKSUM_PASSES / FUSED_RATE, "memory")
        seconds += checked.scaled(1 / every)
    return seconds


def _over_host(case: Case, size: float) -> Estimate:
    """Down from rank 0, once over the network to every other node, up to every engine; checksums in one thread."""
    machine, every = case.machine, case.config.rollout.check_weight_sync
    down = machine.host.rate.seconds(size, "host")
    loading = down + _by(size, HOST_COPY, "copies in host memory")
    if every:
        loading += _by(size / every, HOST_CHECKSUM, "checksums on the host")
    nodes = case.devices > machine.devices_per_node
    return latest(down, loading, machine.network.rate.seconds(size, "network") if nodes else NOTHING)


def _by(size: float, rate: Rate, name: str) -> Estimate:
    """Seconds of `size` bytes at a rate that the machine file does not have."""
    value, low, high = rate
    return Estimate(size / value, size / high, size / low, not_calibrated=frozenset({name}))


def _own_bytes(case: Case) -> float:
    """Weights and optimizer state that a rank writes: its share of its shard. State is stored in float32 (docs/checkpoints.md)."""
    shard, parallel = largest_shard(case), case.config.parallel
    per_parameter = 12 if case.config.model.dtype == "float32" else 2 + 12
    dense = shard.dense * per_parameter / (parallel.data_parallel_size * parallel.context_parallel_size)
    return dense + shard.experts * per_parameter / expert_replicas(parallel)
