"""A trainer rank's memory as predicted, against tensors measured on one H200 (docs/benchmarks.md, "Training step")."""

import pytest

from megatron_fipo.config import BatchConfig, Config, ModelConfig, RolloutConfig
from megatron_fipo.families.qwen2 import QWEN2
from megatron_fipo.plan.case import Case
from megatron_fipo.plan.memory.trainer import trainer_memory
from megatron_fipo.plan.workload import Assumptions
from tests.plan.machines import toy_machine
from tools.bench.gpu_layers import LAYERS
from tools.bench.gpu_models import MODELS

SHAPES = MODELS | {"32B": LAYERS}
ONE, FOUR = (1_024, 19_456), (512, 4_608)
ROWS = [
    ("0.5B", ONE, "none", "blockwise", 27.7),
    ("0.5B", FOUR, "none", "blockwise", 27.8),
    ("1.5B", ONE, "none", "blockwise", 66.4),
    ("1.5B", FOUR, "none", "blockwise", 66.4),
    ("32B", ONE, "none", "blockwise", 105.0),
    ("32B", FOUR, "none", "blockwise", 105.0),
    # the same in an earlier run of the day
    ("32B", ONE, "none", "blockwise", 106.9),
    ("32B", FOUR, "none", "blockwise", 107.0),
    ("0.5B", ONE, "hybrid", "blockwise", 25.2),
    ("0.5B", FOUR, "hybrid", "blockwise", 25.3),
    ("1.5B", ONE, "hybrid", "blockwise", 61.7),
    ("1.5B", FOUR, "hybrid", "blockwise", 61.7),
    ("32B", ONE, "hybrid", "blockwise", 104.1),
    ("32B", FOUR, "hybrid", "blockwise", 104.1),
    ("32B", ONE, "hybrid", "tensorwise", 106.6),
    ("32B", FOUR, "hybrid", "tensorwise", 106.6),
]
OUTSIDE = ("CUDA and libraries", "fragmentation")
"""Not tensors: torch's peak of allocated memory does not have them."""


@pytest.mark.parametrize(("model", "lengths", "fp8", "recipe", "measured"), ROWS)
def test_tensors_of_a_step_are_within_5_percent(model, lengths, fp8, recipe, measured):
    """BF16 within 2 %. FP8 blockwise is predicted 2 to 3 % too high."""
    prompt, response = lengths
    config = Config(
        model=ModelConfig(fp8=fp8, fp8_recipe=recipe),
        batch=BatchConfig(
            prompts_per_iteration=1,
            mini_batch_prompts=1,
            responses_per_prompt=2,
            max_tokens_per_micro_batch=20_480,
        ),
        rollout=RolloutConfig(placement="separate"),
    )
    case = Case(
        config,
        QWEN2,
        QWEN2.translate(SHAPES[model].hf_config()),
        toy_machine(device="NVIDIA H200"),
        Assumptions(prompt_tokens=prompt, response_end=response, prompt_spread=0, response_spread=0),
    )
    parts = trainer_memory(case, 0).parts
    tensors = sum(part.value for name, part in parts.items() if name not in OUTSIDE) / 2**30
    assert tensors == pytest.approx(measured, rel=0.05 if fp8 == "hybrid" else 0.02)
