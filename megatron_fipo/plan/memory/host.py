"""Host memory of the fullest node, by part.

    trainer processes   Python, torch, CUDA and Megatron-Core of each rank; not measured on a GPU
    packs               each rank's shards on the host while they are built: 0.55, 0.28 and 0.15 GiB per rank of 79 million
                        trained tokens with 4 context-parallel and 1, 2 and 4 data-parallel ranks (docs/benchmarks.md, "An
                        iteration at the recipe's scale"), 120 bytes per token of two mini-steps
    optimizer           offloaded master weights, moments and gradients
    checkpoint          copies of each rank's part until the background writer has written them: weights, master weights
                        and float32 moments, 14 bytes per bfloat16 parameter over the ranks that share its state
                        (docs/checkpoints.md; 1.00 times that was measured)
    object store        replies, 8 bytes, and the shares of the data-parallel ranks on the node, 9 bytes per trained token;
                        buckets of weights if they go through the store; with model.router.replay=rollout also the routes,
                        in replies and shares
    engines             processes and pinned buffers of vLLM's workers on this node; not measured on a GPU
    scorers, driver     90 MB each (`reward.scorers`), and 0.69 GiB (same table as packs)

The page cache of model files and checkpoints is not counted: it gives way.
"""

from megatron_fipo.plan.case import Case
from megatron_fipo.plan.estimate import Breakdown, Estimate, exact
from megatron_fipo.plan.experts import engine_route_bytes, expert_replicas, shard_route_bytes
from megatron_fipo.plan.layout import mini_steps
from megatron_fipo.plan.memory.state import BYTES_PER_ELEMENT, Stage, stage_state

GIB = 2**30
HOST_PACK_BYTES = 120
"""Per token of two mini-steps on a rank."""
REPLY_BYTES, SHARE_BYTES = 8, 9
"""Per trained token in the object store."""
BUCKETS_IN_STORE = 3
"""As `weight_sync.transport.BUCKETS_IN_STORE`."""
SCORER_BYTES = 90e6
DRIVER = Estimate(
    0.7 * GIB, 0.6 * GIB, 1.5 * GIB, sources=frozenset({"recipe_scale, CPU machine, 2026-11-29"})
)
RANK = Estimate(
    4.0 * GIB, 2.0 * GIB, 8.0 * GIB, not_calibrated=frozenset({"host memory of a trainer rank on a GPU"})
)
WORKER = Estimate(
    5.0 * GIB, 2.0 * GIB, 10.0 * GIB, not_calibrated=frozenset({"host memory of a vLLM worker on a GPU"})
)
MASTER_AND_MOMENTS = 12
"""Bytes per parameter in a checkpoint, always float32."""


def node_memory(case: Case) -> Breakdown:
    """Host bytes of the node that has the most: as many trainer ranks as fit, then engines, and the driver."""
    config = case.config
    ranks, workers = _processes(case)
    stages = [
        stage_state(config, case.family, case.architecture, index)
        for index in range(config.parallel.pipeline_model_parallel_size)
    ]
    parts = {
        "trainer processes": RANK.scaled(ranks),
        "packs": _packs(case).scaled(ranks),
        "optimizer": exact(float(ranks * max(stage.host_bytes for stage in stages))),
        "checkpoint": exact(ranks * max(_checkpoint(case, stage) for stage in stages)),
        "object store": _object_store(case, ranks),
        "engines": WORKER.scaled(workers),
        "scorers": exact(config.reward.scorers * SCORER_BYTES),
        "driver": DRIVER,
    }
    return Breakdown(parts)


def _processes(case: Case) -> tuple[int, int]:
    """Trainer ranks and engine workers of the fullest node."""
    per_node = case.machine.devices_per_node
    ranks = min(per_node, case.trainer_devices)
    space = per_node if case.colocated else per_node - ranks
    return ranks, min(space, case.engine_devices)


def _packs(case: Case) -> Estimate:
    """Of a rank."""
    parallel, steps = case.config.parallel, mini_steps(case.config)
    tokens = case.workload().trained_tokens / (parallel.data_parallel_size * parallel.context_parallel_size)
    value = min(2, steps) / steps * tokens * (HOST_PACK_BYTES + shard_route_bytes(case))
    return Estimate(
        value, 0.9 * value, 1.2 * value, sources=frozenset({"recipe_scale, CPU machine, 2026-11-29"})
    )


def _checkpoint(case: Case, stage: Stage) -> float:
    """Of a rank: its part of weights, master weights and moments."""
    config = case.config
    dtype = config.model.dtype
    per_parameter = MASTER_AND_MOMENTS + (BYTES_PER_ELEMENT[dtype] if dtype != "float32" else 0)
    parallel, dense = config.parallel, stage.parameters - stage.expert_parameters
    shards = parallel.data_parallel_size * parallel.context_parallel_size, expert_replicas(parallel)
    if not config.optimizer.distributed:
        shards = 1, 1
    return dense * per_parameter / shards[0] + stage.expert_parameters * per_parameter / shards[1]


def _object_store(case: Case, ranks: int) -> Estimate:
    config = case.config
    tokens = case.workload().trained_tokens
    replicas = config.parallel.data_parallel_size
    shares = min(1.0, ranks / replicas)
    routes = engine_route_bytes(case)
    value = tokens * (REPLY_BYTES + routes + (SHARE_BYTES + routes) * shares)
    if case.sends_weights_over_host:
        value += BUCKETS_IN_STORE * config.rollout.weight_bucket_mb * 2**20
    return Estimate(
        value, 0.9 * value, 1.5 * value, sources=frozenset({"recipe_scale, CPU machine, 2026-11-29"})
    )
