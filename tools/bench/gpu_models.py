"""Policies that the benchmarks of steps run: shapes, packs, whether they can run here, and one model alive at a time."""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec

import torch

from megatron_fipo.batching.shard import PackedShard
from megatron_fipo.config import Config, HeadConfig, ModelConfig, OptimizerSettings
from megatron_fipo.config.gpu_rules import check_accelerators, fp8_obstacle
from megatron_fipo.environment import find_accelerators
from megatron_fipo.errors import UserError
from megatron_fipo.families.qwen2 import QWEN2
from megatron_fipo.objective.config import ObjectiveConfig
from megatron_fipo.plan.case import Case
from megatron_fipo.plan.machine_file import load_machine
from megatron_fipo.plan.memory.trainer import trainer_memory
from megatron_fipo.plan.workload import Assumptions
from megatron_fipo.trainer.rank_model import RankModel
from tests.gpu.policies import Shape, new_policy, one_rank, random_shard, score, with_old_log_probs
from tools.bench.harness import Bench, release
from tools.bench.report import Row

MODELS = {
    "0.5B": Shape(24, 896, 4_864, 14, 2, 151_936, tied=True),
    "1.5B": Shape(28, 1_536, 8_960, 12, 2, 151_936, tied=True),
}
TOY = Shape(2, 32, 48, 4, 2, 61, tied=True, positions=256)
PACKS = {"1 x 20,480": ([1_024], [19_456]), "4 x 5,120": ([512] * 4, [4_608] * 4)}
TOY_PACKS = {"1 x 20,480": ([10], [50]), "4 x 5,120": ([5] * 4, [10] * 4)}
"""Lengths of prompts and responses."""
LONGEST = "1 x 20,480"
LR, WARM_UP = 1e-6, 2
OBJECTIVE = ObjectiveConfig()
RECOMPUTED = HeadConfig(logits_memory_mb=0)
"""Without logits that are kept in the memory that happens to be free."""
Lengths = tuple[list[int], list[int]]
"""Of prompts and responses, equal within each."""


def settings(recipe: str | None, recompute: str = "none", fp8_parameters: bool = False) -> ModelConfig:
    """A model in BF16, or in FP8 with this recipe."""
    if recipe is None:
        return ModelConfig(recompute=recompute)
    return ModelConfig(
        recompute=recompute,
        fp8="hybrid",
        fp8_recipe=recipe,
        fp8_param_gather=fp8_parameters,
        layer_spec="transformer_engine",
    )


def planned(bench: Bench, shape: Shape, model: ModelConfig, lengths: Lengths, offload: float = 0.0) -> Case:
    """The planner's case of a step with one micro-batch of these sequences, on a machine like this one, with logits recomputed.

    Rates are an H200's: times hold there only.
    """
    prompts, responses = lengths
    config = Config(model=model, head=RECOMPUTED, optimizer=OptimizerSettings(cpu_offload=offload))
    tokens = -(-(sum(prompts) + sum(responses)) // model.token_multiple) * model.token_multiple
    config.batch.prompts_per_iteration = config.batch.mini_batch_prompts = 1
    config.batch.responses_per_prompt, config.batch.max_tokens_per_micro_batch = len(prompts), tokens
    config.rollout.max_prompt_length, config.rollout.max_response_length = prompts[0], responses[0]
    config.rollout.placement = "separate"
    machine = load_machine("h200" if bench.on_gpu else "cpu")
    if bench.on_gpu:
        machine = replace(machine, device=torch.cuda.get_device_name(bench.device))
    assumed = Assumptions(
        prompt_tokens=prompts[0],
        response_end=float(responses[0]),
        prompt_spread=0.0,
        response_spread=0.0,
        informative=1.0,
    )
    return Case(config, QWEN2, QWEN2.translate(shape.hf_config()), machine, assumed)


def obstacle(
    bench: Bench, shape: Shape, model: ModelConfig, lengths: Lengths, offload: float = 0.0
) -> str | None:
    """Why a step cannot run here: a package, the GPU, or too little memory by the planner's estimate. None if it can."""
    if model.layer_spec == "transformer_engine" and find_spec("transformer_engine") is None:
        return "transformer_engine is not installed"
    if model.fp8 != "none" and (why := fp8_obstacle(model.fp8_recipe, find_accelerators())):
        return why
    try:
        check_accelerators(model, OptimizerSettings(cpu_offload=offload), find_accelerators())
    except UserError as error:
        return str(error)
    needed = trainer_memory(planned(bench, shape, model, lengths, offload), 0).total.value
    return memory_obstacle(needed, free_bytes(bench))


def memory_obstacle(needed: float, free: float | None) -> str | None:
    """Why a step that is estimated to need this many bytes cannot run with `free` ones (None: unknown, so it may)."""
    if free is None or needed <= free:
        return None
    return f"it needs {needed / 2**30:.1f} GiB by the planner's estimate and {free / 2**30:.1f} GiB are free"


def free_bytes(bench: Bench) -> int | None:
    """Of the GPU; None on a CPU, where toy sizes always fit."""
    return torch.cuda.mem_get_info(bench.device)[0] if bench.on_gpu else None


def with_policy(
    bench: Bench,
    shape: Shape,
    model: ModelConfig,
    body: Callable[[RankModel], Iterator[Row]],
    optimizer: OptimizerSettings | None = None,
    head: HeadConfig | None = None,
) -> Iterator[Row]:
    """The rows of `body`, called with a new policy that only it refers to: afterwards the memory is free again."""
    release(bench)  # what an exception still referred to
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()  # the policy keeps logits in what its own peak leaves free
    with one_rank(bench, seed=3):
        yield from body(new_policy(bench, shape, model, head, optimizer or OptimizerSettings(lr=LR)))
    release(bench)


def packs(
    bench: Bench, policy: RankModel, shape: Shape, model: ModelConfig, only: str | None = None
) -> Iterator[tuple[str, list[PackedShard]]]:
    """Each pack by name, as a mini-batch of one micro-batch with old log-probs near the policy's own."""
    for index, (name, (prompts, responses)) in enumerate(bench.pick(PACKS, TOY_PACKS).items()):
        if only in (None, name):
            shard = random_shard(bench, shape, prompts, responses, seed=index, multiple=model.token_multiple)
            yield name, with_old_log_probs([shard], score(policy, [shard], drift=0.02, seed=index))
