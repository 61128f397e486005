"""Time of an optimizer step beyond the micro-batches: reduction of gradients, AdamW, gather of weights.

Ignored: that the all-gather of weights could run beside the next forward pass (Megatron-Core's `overlap_param_gather` is
not used), and, with `cpu_offload`, the arithmetic of AdamW on the host, of which a machine has no figure.
"""

from dataclasses import dataclass, replace

from megatron_fipo.plan.case import Case
from megatron_fipo.plan.estimate import NOTHING, Estimate
from megatron_fipo.plan.experts import expert_count
from megatron_fipo.plan.memory.state import BYTES_PER_ELEMENT, GRADIENT_BYTES
from megatron_fipo.plan.time.collectives import expert_replica_group, replica_group
from megatron_fipo.plan.time.layer import FUSED_RATE
from megatron_fipo.plan.time.weights import model_weights

GRADIENT_PASSES = 12
"""Bytes per parameter of a rank: the float32 gradient is cleared (4), and scaled by the number of tokens (8)."""
OFFLOAD_BYTES = 8
"""Per offloaded parameter over the host's link: its float32 gradient down, the new float32 weight up."""


@dataclass(frozen=True)
class Shard:
    """Parameters of a rank."""

    dense: float
    experts: float


def largest_shard(case: Case) -> Shard:
    """Parameters of a rank of the pipeline stage that has most: the first, with the embedding, or the last."""
    parallel, weights = case.config.parallel, model_weights(case)
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    ends = weights.ends if pp == 1 else max(weights.embedding, weights.ends - weights.embedding)
    ways = parallel.expert_tensor_parallel_size * parallel.expert_model_parallel_size
    routed = weights.expert * expert_count(case.architecture) / (pp * ways)
    return Shard((weights.dense / pp + ends) / tp, routed)


def optimizer_time(case: Case) -> Estimate:
    """Seconds of clearing, scaling, clipping and AdamW, and of copies to and from the host for offloaded state."""
    shard, settings = largest_shard(case), case.config.optimizer
    parameters = shard.dense + shard.experts
    dense, routed = _owners(case)
    owned = shard.dense / dense + shard.experts / routed
    state, element = BYTES_PER_ELEMENT[settings.state_dtype], BYTES_PER_ELEMENT[case.config.model.dtype]
    master = 0 if element == 4 else 4
    # Norm (4), clipping (8); gradient, weight and moments read, weight and moments written; the model's weight.
    adam = 12 + 4 + 2 * (4 + 2 * state) + (element if master else 0)
    on_device = owned * adam * (1 - settings.cpu_offload)
    seconds = case.machine.memory.seconds((parameters * GRADIENT_PASSES + on_device) / FUSED_RATE, "memory")
    if not settings.cpu_offload:
        return seconds
    copied = case.machine.host.rate.seconds(owned * settings.cpu_offload * OFFLOAD_BYTES, "host")
    result = seconds + copied
    return replace(result, not_calibrated=result.not_calibrated | {"AdamW on the host"})


def gradient_reduction(case: Case) -> Estimate:
    """Seconds of the reduce-scatter (distributed optimizer) or all-reduce of all float32 gradients."""
    shard, whole = largest_shard(case), not case.config.optimizer.distributed
    total = NOTHING
    for group, parameters in (
        (replica_group(case), shard.dense),
        (expert_replica_group(case), shard.experts),
    ):
        size = parameters * GRADIENT_BYTES
        total += group.reduce(size) if whole else group.gather(size)
    return total


def weight_gather(case: Case) -> Estimate:
    """Seconds of the all-gather of updated weights; none without the distributed optimizer."""
    if not case.config.optimizer.distributed:
        return NOTHING
    model, shard = case.config.model, largest_shard(case)
    element = 1 if model.fp8 != "none" and model.fp8_param_gather else BYTES_PER_ELEMENT[model.dtype]
    return replica_group(case).gather(shard.dense * element) + expert_replica_group(case).gather(
        shard.experts * element
    )


def _owners(case: Case) -> tuple[int, int]:
    """Ranks over which the state of a parameter is sharded: dense ones, and those of experts."""
    if not case.config.optimizer.distributed:
        return 1, 1
    return replica_group(case).size, expert_replica_group(case).size
