"""What each trainer rank holds and computes: coordinates, layers, weights, packs and micro-batches in flight.

Pure arithmetic over the parallel layout, with Megatron-Core's conventions.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from megatron_fipo.batching.packing import micro_batch_multiple
from megatron_fipo.checkpoint.convert.name_map import stages_of
from megatron_fipo.config import Config, ParallelConfig
from megatron_fipo.families.family import Architecture, Family, Weight, padded_vocab_size
from megatron_fipo.plan.case import Case


@dataclass(frozen=True)
class RankGroup:
    """The tensor-parallel ranks of one (pipeline, data, context) coordinate; they are consecutive."""

    first_rank: int
    last_rank: int
    pipeline: int
    data: int
    context: int


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


@lru_cache(maxsize=64)
def distinct_weights(family: Family, architecture: Architecture) -> tuple[Weight, ...]:
    """All weights, but of the experts of a layer only the first: the others have its shapes."""
    return tuple(weight for weight in family.weights(architecture) if not weight.expert)


def stage_weights(
    family: Family, architecture: Architecture, parallel: ParallelConfig, index: int
) -> list[Weight]:
    """The `distinct_weights` of pipeline stage `index`.

    Those of its layers; on the first stage the embedding, on the last all others. A tied embedding is also
    the output layer, so the last stage has it too, as a separate copy if it is not the first.
    """
    return [
        weight
        for weight in distinct_weights(family, architecture)
        if any(stage.pipeline == index for stage in stages_of(weight, architecture, parallel))
    ]


def vocabulary_columns(case: Case) -> int:
    """Rows of the embedding and columns of the output layer on a rank, padding included."""
    tp = case.config.parallel.tensor_model_parallel_size
    return padded_vocab_size(case.architecture.vocab_size, tp) // tp


def micro_batch_tokens(config: Config) -> int:
    """Largest micro-batch, in padded tokens over all context-parallel ranks.

    With FP8 a multiple of the FP8 block on every rank.
    """
    multiple = config.parallel.pack_multiple(config.model.token_multiple)
    limit = config.batch.max_tokens_per_micro_batch * config.parallel.context_parallel_size
    return limit // multiple * multiple


def mini_steps(config: Config) -> int:
    """Optimizer steps per iteration."""
    return config.batch.prompts_per_iteration // config.batch.mini_batch_prompts


def micro_batches(case: Case, progress: float = 1.0) -> int:
    """Micro-batches of an optimizer step on each data-parallel rank, if all are full; a multiple of pp if interleaved."""
    parallel = case.config.parallel
    tokens = case.workload(progress).trained_tokens / mini_steps(case.config) / parallel.data_parallel_size
    count = max(1, math.ceil(tokens / micro_batch_tokens(case.config)))
    multiple = micro_batch_multiple(
        parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    )
    return -(-count // multiple) * multiple


def chunks_in_flight(parallel: ParallelConfig, stage: int, micro_batches: int) -> int:
    """Forward passes of model chunks whose backward pass is still to come, when a backward pass of `stage` begins.

    1F1B: the last of p stages has 1, stage s has p − s. Interleaved with v chunks: 2·(p − 1 − s) + (v − 1)·p + 1
    (`get_pp_rank_microbatches` in Megatron-Core's schedules.py). Never more than there are.

    Example: p = 4, v = 2, stage 1 has 2·2 + 4 + 1 = 9 chunk passes in flight: 4.5 times all of its layers.
    """
    later = parallel.pipeline_model_parallel_size - 1 - stage
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    warm_up = later if chunks == 1 else 2 * later + (chunks - 1) * parallel.pipeline_model_parallel_size
    return min(warm_up + 1, micro_batches * chunks)
