"""The plan of a training run: the content and memory of each rank, and the work of one iteration.

Pure arithmetic.
"""

from dataclasses import dataclass

from megatron_fipo.checkpoint.convert.name_map import stages_of
from megatron_fipo.config import Config, ParallelConfig
from megatron_fipo.families.family import Architecture, Family, Weight, padded_vocab_size

BYTES_PER_ELEMENT = {"bfloat16": 2, "float32": 4}
GRADIENT_BYTES = 4
"""Gradients accumulate in float32 regardless of the parameters' dtype."""
FP8_BYTES = 2
"""An FP8 matrix is stored twice, plain and transposed: Hopper multiplies FP8 in one memory layout only."""


@dataclass(frozen=True)
class RankGroup:
    """The tensor-parallel ranks of one (pipeline, data, context) coordinate; they are consecutive."""

    first_rank: int
    last_rank: int
    pipeline: int
    data: int
    context: int


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
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    host_bytes: int
    """In host memory: offloaded master weights and moments, and the gradients copied to them."""

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


@dataclass(frozen=True)
class Work:
    """The work of one iteration, as upper bounds.

    Every group is trained on, and every sequence has the maximum length.
    """

    responses: int
    """Trained on per iteration."""
    responses_in_flight: int
    """In the engines at the same time."""
    longest_sequence: int
    """Tokens of prompt and response, padded for context parallelism."""
    mini_steps: int
    """Optimizer steps per iteration."""
    responses_per_mini_step: int
    tokens_per_mini_step: int
    tokens_per_iteration: int
    micro_batch_tokens: int
    """Budget of one micro-batch, over all context-parallel ranks.

    With FP8 a multiple of the FP8 block on every rank.
    """
    micro_batches: int
    """Per optimizer step, on each data-parallel rank."""


@dataclass(frozen=True)
class Plan:
    """What a run needs: ranks, memory and work."""

    parameters: int
    """Of the complete model, without vocabulary padding."""
    padded_vocab: int
    groups: tuple[RankGroup, ...]
    stages: tuple[Stage, ...]
    work: Work


def make_plan(config: Config, family: Family, architecture: Architecture) -> Plan:
    """The plan of a validated configuration, for a model as returned by `read_model_config`."""
    parallel = config.parallel
    return Plan(
        parameters=family.parameters(architecture),
        padded_vocab=padded_vocab_size(architecture.vocab_size, parallel.tensor_model_parallel_size),
        groups=rank_groups(parallel),
        stages=tuple(
            _stage(config, family, architecture, index)
            for index in range(parallel.pipeline_model_parallel_size)
        ),
        work=_work(config),
    )


def rank_groups(parallel: ParallelConfig) -> tuple[RankGroup, ...]:
    """Megatron-Core's order of ranks: tensor fastest, then context, data, pipeline."""
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    dp, pp = parallel.data_parallel_size, parallel.pipeline_model_parallel_size
    coordinates = ((p, d, c) for p in range(pp) for d in range(dp) for c in range(cp))
    return tuple(RankGroup(n * tp, n * tp + tp - 1, p, d, c) for n, (p, d, c) in enumerate(coordinates))


def stage_layers(layers: int, parallel: ParallelConfig, index: int) -> tuple[range, ...]:
    """Layers of each model chunk of pipeline stage `index`.

    The layers are cut into equal pieces; chunk v of stage p is piece v·pp + p.
    """
    pp = parallel.pipeline_model_parallel_size
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    size = layers // (pp * chunks)
    return tuple(range((v * pp + index) * size, (v * pp + index + 1) * size) for v in range(chunks))


def stage_weights(
    family: Family, architecture: Architecture, parallel: ParallelConfig, index: int
) -> list[Weight]:
    """The weights of pipeline stage `index`.

    Those of its layers; on the first stage the embedding, on the last all others. A tied embedding is also
    the output layer, so the last stage has it too, as a separate copy if it is not the first.
    """
    return [
        weight
        for weight in family.weights(architecture)
        if any(stage.pipeline == index for stage in stages_of(weight, architecture, parallel))
    ]


def _stage(config: Config, family: Family, architecture: Architecture, index: int) -> Stage:
    parallel = config.parallel
    weights = stage_weights(family, architecture, parallel, index)
    parameters = sum(weight.parameters_per_rank(parallel.tensor_model_parallel_size) for weight in weights)
    shards = (
        parallel.data_parallel_size * parallel.context_parallel_size if config.optimizer.distributed else 1
    )
    return Stage(
        index=index,
        layers=stage_layers(architecture.num_layers, parallel, index),
        has_embedding=index == 0,
        has_output=index == parallel.pipeline_model_parallel_size - 1,
        parameters=parameters,
        weight_bytes=_weight_bytes(config, weights),
        gradient_bytes=parameters * GRADIENT_BYTES,
        optimizer_bytes=round(parameters * _optimizer_bytes(config) * (1 - config.optimizer.cpu_offload))
        // shards,
        host_bytes=round(
            parameters * (_optimizer_bytes(config) + GRADIENT_BYTES) * config.optimizer.cpu_offload
        )
        // shards,
    )


def _weight_bytes(config: Config, weights: list[Weight]) -> int:
    """With FP8, layer matrices also have FP8 copies; with `fp8_param_gather` these replace the weights."""
    tp, model = config.parallel.tensor_model_parallel_size, config.model
    element = BYTES_PER_ELEMENT[model.dtype]
    matrix = element if model.fp8 == "none" else FP8_BYTES if model.fp8_param_gather else element + FP8_BYTES
    return sum(
        weight.parameters_per_rank(tp) * (matrix if weight.is_layer_matrix else element) for weight in weights
    )


def _optimizer_bytes(config: Config) -> int:
    """Per parameter: two moments, and a float32 master weight if the parameter is not float32."""
    return 2 * BYTES_PER_ELEMENT[config.optimizer.state_dtype] + (0 if config.model.dtype == "float32" else 4)


def _work(config: Config) -> Work:
    batch, parallel, rollout = config.batch, config.parallel, config.rollout
    longest = rollout.max_prompt_length + rollout.max_response_length
    pack_multiple = parallel.pack_multiple(config.model.token_multiple)
    padded = -(-longest // parallel.length_multiple) * parallel.length_multiple
    responses = batch.prompts_per_iteration * batch.responses_per_prompt
    per_mini_step = batch.mini_batch_prompts * batch.responses_per_prompt
    token_limit = batch.max_tokens_per_micro_batch * parallel.context_parallel_size
    micro_batch_tokens = token_limit // pack_multiple * pack_multiple
    per_rank = -(-per_mini_step // parallel.data_parallel_size)
    return Work(
        responses=responses,
        responses_in_flight=rollout.prompts_in_flight * batch.responses_per_prompt,
        longest_sequence=padded,
        mini_steps=batch.prompts_per_iteration // batch.mini_batch_prompts,
        responses_per_mini_step=per_mini_step,
        tokens_per_mini_step=per_mini_step * longest,
        tokens_per_iteration=responses * longest,
        micro_batch_tokens=micro_batch_tokens,
        micro_batches=-(-per_rank // (micro_batch_tokens // padded)),
    )
