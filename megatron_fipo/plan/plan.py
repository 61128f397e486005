"""The plan of a training run: content, memory and work of each rank, the time of an iteration, and what does not fit.

Pure arithmetic: nothing is started, and no GPU is needed.
"""

from dataclasses import dataclass

from megatron_fipo.config import Config
from megatron_fipo.families.family import padded_vocab_size
from megatron_fipo.plan.case import Case
from megatron_fipo.plan.estimate import Breakdown, Estimate
from megatron_fipo.plan.fit import Misfit, misfits
from megatron_fipo.plan.iteration import Iteration, iteration, run_time
from megatron_fipo.plan.layout import RankGroup, micro_batch_tokens, mini_steps, rank_groups
from megatron_fipo.plan.memory.engine import EngineMemory, engine_memory
from megatron_fipo.plan.memory.host import node_memory
from megatron_fipo.plan.memory.state import Stage, stage_state
from megatron_fipo.plan.memory.trainer import trainer_memory


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
    """What a run needs."""

    case: Case
    parameters: int
    """Of the complete model, without vocabulary padding."""
    padded_vocab: int
    groups: tuple[RankGroup, ...]
    stages: tuple[Stage, ...]
    work: Work
    memory: tuple[Breakdown, ...]
    """Bytes of a trainer rank, by pipeline stage."""
    engine: EngineMemory
    node: Breakdown
    """Bytes of host memory of a node."""
    misfits: tuple[Misfit, ...]


@dataclass(frozen=True)
class Times:
    """How long the run takes: the iteration at the end of training, and all of them."""

    iteration: Iteration
    run: Estimate


def make_plan(case: Case) -> Plan:
    """The plan of a valid configuration."""
    config, parallel = case.config, case.config.parallel
    stages = range(parallel.pipeline_model_parallel_size)
    return Plan(
        case=case,
        parameters=case.family.parameters(case.architecture),
        padded_vocab=padded_vocab_size(case.architecture.vocab_size, parallel.tensor_model_parallel_size),
        groups=rank_groups(parallel),
        stages=tuple(stage_state(config, case.family, case.architecture, stage) for stage in stages),
        work=_work(config),
        memory=tuple(trainer_memory(case, stage) for stage in stages),
        engine=engine_memory(case),
        node=node_memory(case),
        misfits=tuple(misfits(case)),
    )


def make_times(case: Case) -> Times:
    """The times of a case whose engines fit: their caches hold the longest response."""
    last = iteration(case)
    return Times(last, run_time(case, last))


def _work(config: Config) -> Work:
    batch, parallel, rollout = config.batch, config.parallel, config.rollout
    longest = rollout.longest_sequence
    padded = -(-longest // parallel.length_multiple) * parallel.length_multiple
    responses = batch.prompts_per_iteration * batch.responses_per_prompt
    per_mini_step = batch.mini_batch_prompts * batch.responses_per_prompt
    tokens = micro_batch_tokens(config)
    per_rank = -(-per_mini_step // parallel.data_parallel_size)
    return Work(
        responses=responses,
        responses_in_flight=rollout.prompts_in_flight * batch.responses_per_prompt,
        longest_sequence=padded,
        mini_steps=mini_steps(config),
        responses_per_mini_step=per_mini_step,
        tokens_per_mini_step=per_mini_step * longest,
        tokens_per_iteration=responses * longest,
        micro_batch_tokens=tokens,
        micro_batches=-(-per_rank // (tokens // padded)),
    )
