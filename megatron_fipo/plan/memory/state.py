"""Weights, gradients and optimizer state of a trainer rank. Exact, up to the padding of Megatron-Core's flat buffers.

That padding is at most 128 elements per data-parallel rank and bucket, and 63 per parameter whose size is no multiple of 64.
"""

from dataclasses import dataclass
from functools import lru_cache

from megatron_fipo.config import Config, ParallelConfig
from megatron_fipo.families.family import Architecture, Family, Layout
from megatron_fipo.plan.experts import expert_replicas
from megatron_fipo.plan.layout import stage_layers, stage_weights

BYTES_PER_ELEMENT = {"bfloat16": 2, "float32": 4}
GRADIENT_BYTES = 4
"""Gradients accumulate in float32 regardless of the parameters' dtype."""
FP8_BYTES = 2
"""An FP8 matrix is stored twice, plain and transposed: Hopper multiplies FP8 in one memory layout only."""


@dataclass(frozen=True)
class Stage:
    """One rank of a pipeline stage.

    Bytes are of weights, gradients and optimizer on the device, without activations.
    """

    index: int
    layers: tuple[range, ...]
    """Layers of each model chunk; more than one with virtual pipeline stages."""
    has_embedding: bool
    has_output: bool
    parameters: int
    expert_parameters: int
    """Of these, those of experts."""
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    host_bytes: int
    """In host memory: offloaded master weights and moments, and the gradients copied to them."""

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


@dataclass(frozen=True)
class Counts:
    """Parameters of a rank."""

    matrices: int
    """Of its layers, outside experts."""
    experts: int
    router: int
    rest: int
    """Norms, biases, embedding and output layer."""


@lru_cache(maxsize=4096)  # a search asks for the same stages under many other settings
def _counts(
    family: Family,
    architecture: Architecture,
    tp: int,
    pp: int,
    chunks: int | None,
    ep: int,
    etp: int,
    index: int,
) -> Counts:
    """Of pipeline stage `index`."""
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=chunks,
    )
    held = architecture.experts.count // ep if architecture.experts else 0
    matrices = experts = router = rest = 0
    for weight in stage_weights(family, architecture, parallel, index):
        if weight.expert is not None:
            experts += held * weight.parameters_per_rank(etp)
        elif not weight.is_layer_matrix:
            rest += weight.parameters_per_rank(tp)
        elif weight.layout is Layout.REPLICATED:
            router += weight.parameters
        else:
            matrices += weight.parameters_per_rank(tp)
    return Counts(matrices, experts, router, rest)


def stage_state(config: Config, family: Family, architecture: Architecture, index: int) -> Stage:
    """The state of a rank of pipeline stage `index`.

    The distributed optimizer shares its state over data × context ranks; that of experts over those ranks that have the same
    experts. A router that is not trained has weights only.
    """
    parallel, offload = config.parallel, config.optimizer.cpu_offload
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    chunks = parallel.virtual_pipeline_model_parallel_size
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    counts = _counts(family, architecture, tp, pp, chunks, ep, etp, index)
    dense = counts.matrices + counts.rest + (counts.router if config.model.router.trainable else 0)
    trained = dense + counts.experts
    replicas = parallel.data_parallel_size * parallel.context_parallel_size
    shared = [(dense, replicas), (counts.experts, expert_replicas(parallel))]
    if not config.optimizer.distributed:
        shared = [(trained, 1)]
    matrix, element = _matrix_bytes(config), BYTES_PER_ELEMENT[config.model.dtype]
    per_parameter = optimizer_bytes_per_parameter(config)
    return Stage(
        index=index,
        layers=stage_layers(architecture.num_layers, parallel, index),
        has_embedding=index == 0,
        has_output=index == parallel.pipeline_model_parallel_size - 1,
        parameters=counts.matrices + counts.experts + counts.router + counts.rest,
        expert_parameters=counts.experts,
        weight_bytes=(counts.matrices + counts.experts) * matrix + (counts.router + counts.rest) * element,
        gradient_bytes=trained * GRADIENT_BYTES,
        optimizer_bytes=sum(
            round(count * per_parameter * (1 - offload)) // shards for count, shards in shared
        ),
        host_bytes=sum(
            round(count * (per_parameter + GRADIENT_BYTES) * offload) // shards for count, shards in shared
        ),
    )


def optimizer_bytes_per_parameter(config: Config) -> int:
    """Two moments, and a float32 master weight if the parameter is not float32."""
    return 2 * BYTES_PER_ELEMENT[config.optimizer.state_dtype] + (0 if config.model.dtype == "float32" else 4)


def _matrix_bytes(config: Config) -> int:
    """Of an element of a layer's matrix. With FP8 it has FP8 copies; with `fp8_param_gather` these replace the weight."""
    model = config.model
    element = BYTES_PER_ELEMENT[model.dtype]
    return element if model.fp8 == "none" else FP8_BYTES if model.fp8_param_gather else element + FP8_BYTES
