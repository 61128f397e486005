"""Cases of a Qwen2-shaped model on the machine for tests."""

from typing import Any

from megatron_fipo.config import Config
from megatron_fipo.families.family import Architecture
from megatron_fipo.families.qwen2 import QWEN2
from megatron_fipo.families.qwen3_moe import QWEN3_MOE
from megatron_fipo.plan.case import Case
from megatron_fipo.plan.machine import Machine
from megatron_fipo.plan.workload import Assumptions
from tests.plan.machines import MACHINE

SHAPE = Architecture(32, 4096, 14_336, 32, 8, 128, 152_064, 32_768, 1e-6, 1e6, False, add_qkv_bias=True)


def case_of(
    mean: float = 6_000.0,
    machine: Machine = MACHINE,
    architecture: Architecture = SHAPE,
    passes: int = 1,
    **settings: Any,
) -> Case:
    """Settings are named with their section: `parallel__data_parallel_size=2`. Qwen3-MoE if the architecture has experts."""
    config = Config()
    config.batch.prompts_per_iteration, config.batch.mini_batch_prompts = 64, 16
    config.rollout.engine, config.rollout.placement = "vllm", "separate"
    for name, value in settings.items():
        section, _, key = name.partition("__")
        assert hasattr(getattr(config, section), key), name
        setattr(getattr(config, section), key, value)
    lengths = Assumptions(response_end=mean)
    family = QWEN3_MOE if architecture.experts else QWEN2
    return Case(config, family, architecture, machine, lengths, passes)


def layout(
    tp: int = 1, cp: int = 1, pp: int = 1, dp: int = 1, vpp: int | None = None, ep: int = 1, etp: int = 1
) -> dict[str, Any]:
    return {
        "parallel__tensor_model_parallel_size": tp,
        "parallel__sequence_parallel": tp > 1,
        "parallel__context_parallel_size": cp,
        "parallel__pipeline_model_parallel_size": pp,
        "parallel__data_parallel_size": dp,
        "parallel__virtual_pipeline_model_parallel_size": vpp,
        "parallel__expert_model_parallel_size": ep,
        "parallel__expert_tensor_parallel_size": etp,
    }
