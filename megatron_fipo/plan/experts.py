"""Mixtures of experts in a parallel layout: which layers have experts, what a rank holds of them, and the copies of tokens
that it processes.

The ranks of a pipeline stage are tensor × context × data ranks outside experts, and expert-tensor × expert × expert-data ranks
in them, the first fastest. A rank sends each of its tokens to k experts. With t tokens (with sequence parallelism its share)
it makes t · k copies, sends them to the ranks of their experts (all-to-all), and these gather them over the expert-tensor
ranks. If all experts get equally many tokens, a rank processes t · k · etp copies. `load` says how many more the fullest rank
gets; without expert parallelism a rank has all experts of its tokens, so there it is 1.

Example, 128 experts, 8 per token, ep 8, tp 2: of a micro-batch of 22,528 tokens a rank has 11,264, copies them 8 times, and
processes 90,112 copies in 16 experts, the fullest rank 108,134 at a load of 1.2.
"""

from megatron_fipo.config import ParallelConfig
from megatron_fipo.families.family import Architecture, Experts, Layers
from megatron_fipo.plan.case import Case


def layer_kind(architecture: Architecture, layer: int) -> Layers:
    return Layers.EXPERTS if architecture.has_experts(layer) else Layers.DENSE


def layer_counts(architecture: Architecture) -> dict[Layers, int]:
    """Number of layers of each kind that the model has, without experts first."""
    if architecture.experts is None:
        return {Layers.DENSE: architecture.num_layers}
    dense = len(architecture.experts.dense_layers)
    counts = {Layers.DENSE: dense, Layers.EXPERTS: architecture.num_layers - dense}
    return {kind: count for kind, count in counts.items() if count}


def usual_kind(architecture: Architecture) -> Layers:
    """With experts, if any layer has them."""
    return Layers.DENSE if architecture.experts is None else Layers.EXPERTS


def experts_of(case: Case) -> Experts:
    """The experts of a model that has some."""
    assert case.architecture.experts is not None
    return case.architecture.experts


def expert_replicas(parallel: ParallelConfig) -> int:
    """Ranks of a pipeline stage with the same shard of the experts."""
    ways = parallel.expert_tensor_parallel_size * parallel.expert_model_parallel_size
    return parallel.stage_size // ways


def expert_count(architecture: Architecture) -> int:
    """Experts of a layer with experts; 0 in a model without them."""
    return architecture.experts.count if architecture.experts else 0


def active_experts(architecture: Architecture) -> int:
    """Experts that process a token; 0 in a model without them."""
    return architecture.experts.per_token if architecture.experts else 0


def copies_per_token(case: Case) -> float:
    """Copies that a rank processes, for each token of its micro-batch before sequence parallelism, if all ranks get equally
    many."""
    parallel = case.config.parallel
    shards = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    return experts_of(case).per_token * parallel.expert_tensor_parallel_size / shards


def load(case: Case) -> float:
    """Copies of the fullest expert-parallel rank over the mean."""
    return case.expert_load if case.config.parallel.expert_model_parallel_size > 1 else 1.0


def expert_width(case: Case) -> float:
    """Feed-forward width of an expert on one rank."""
    return experts_of(case).ffn_hidden_size / case.config.parallel.expert_tensor_parallel_size


def route_bytes(case: Case) -> int:
    """Of a token's route in one layer: `model.routing.route_dtype` for each of its experts."""
    experts = experts_of(case)
    return experts.per_token * (1 if experts.count <= 255 else 2)


def engine_route_bytes(case: Case) -> int:
    """Of what the rollout engine reports of a token for `model.router.replay=rollout`: its routes in all layers, with or
    without experts. 0 without that replay."""
    if not replays_engine_routes(case):
        return 0
    return case.architecture.num_layers * route_bytes(case)


def shard_route_bytes(case: Case) -> int:
    """The same in a rank's shard, where every number is an int16."""
    if not replays_engine_routes(case):
        return 0
    return case.architecture.num_layers * experts_of(case).per_token * 2


def replays_engine_routes(case: Case) -> bool:
    return case.architecture.experts is not None and case.config.model.router.replay == "rollout"
