"""The planner's case of a recipe in a fixed layout, for tests: the shipped layouts may change."""

from pathlib import Path
from typing import Any

from megatron_fipo.config import load_config, validate
from megatron_fipo.families.family import Experts
from megatron_fipo.families.registry import read_model_config
from megatron_fipo.plan.case import Case
from megatron_fipo.plan.machine import Machine
from megatron_fipo.plan.workload import Assumptions
from tests.plan.machines import toy_machine

EXAMPLES = Path(__file__).parents[2] / "examples"
LAYOUTS = {
    "qwen2.5-32b": {
        "model.recompute": "full",
        "parallel.tensor_model_parallel_size": 8,
        "parallel.sequence_parallel": "true",
        "parallel.context_parallel_size": 4,
        "parallel.pipeline_model_parallel_size": 4,
        "parallel.virtual_pipeline_model_parallel_size": "null",
        "parallel.data_parallel_size": 1,
        "batch.max_tokens_per_micro_batch": 11264,
        "rollout.num_engines": 16,
        "rollout.engine_tensor_parallel_size": 4,
    },
    "qwen2.5-7b-math": {
        "model.recompute": "selective",
        "parallel.tensor_model_parallel_size": 4,
        "parallel.sequence_parallel": "true",
        "parallel.context_parallel_size": 2,
        "parallel.pipeline_model_parallel_size": 1,
        "parallel.virtual_pipeline_model_parallel_size": "null",
        "parallel.data_parallel_size": 4,
        "batch.max_tokens_per_micro_batch": 12288,
        "rollout.num_engines": 8,
        "rollout.engine_tensor_parallel_size": 1,
    },
    "qwen3-30b-a3b": {
        "model.recompute": "full",
        "parallel.tensor_model_parallel_size": 2,
        "parallel.sequence_parallel": "true",
        "parallel.context_parallel_size": 1,
        "parallel.pipeline_model_parallel_size": 2,
        "parallel.virtual_pipeline_model_parallel_size": "null",
        "parallel.data_parallel_size": 4,
        "parallel.expert_model_parallel_size": 8,
        "batch.max_tokens_per_micro_batch": 22528,
        "rollout.num_engines": 8,
        "rollout.engine_tensor_parallel_size": 2,
    },
}
"""GPUs of the trainer and of the engines: 128 and 64, 32 and 8, 16 and 16."""
SETTINGS = {
    "batch.prompts_per_iteration": 512,
    "batch.mini_batch_prompts": 64,
    "rollout.placement": "separate",
    "rollout.mode": "synchronous",
    "rollout.unfinished": "drop",
    "rollout.gpu_memory_share": 0.85,
    "head.workspace_mb": 384,
    "head.logits_memory_mb": 0,
    "optimizer.state_dtype": "float32",
    "optimizer.cpu_offload": 0,
    "reward.scorers": 1,
}
"""Of all."""


def recipe_case(
    name: str,
    *overrides: str,
    machine: Machine | None = None,
    assumptions: Assumptions | None = None,
) -> Case:
    """`examples/NAME/fipo.yaml` with the settings above and overrides, on 80 GiB GPUs unless `machine` is given. Validated."""
    fixed = [f"{key}={value}" for key, value in (LAYOUTS[name] | SETTINGS).items()]
    config = load_config(EXAMPLES / f"{name}/fipo.yaml", [*fixed, *overrides])
    config.model.path = str(EXAMPLES / name)
    family, architecture = read_model_config(config.model.path)
    validate(config, architecture)
    return Case(
        config,
        family,
        architecture,
        machine or toy_machine(),
        assumptions or Assumptions(),
    )


def expert_keys(experts: Experts, head_size: int) -> dict[str, Any]:
    """The keys of Qwen3-MoE's config.json that Qwen2's does not have, or has with another value."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": head_size,
        "num_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
        "moe_intermediate_size": experts.ffn_hidden_size,
        "norm_topk_prob": experts.normalized,
        "mlp_only_layers": list(experts.dense_layers),
    }
