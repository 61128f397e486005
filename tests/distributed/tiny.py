"""A model and a batch small enough to compare many parallel layouts in seconds, and a way to see every gradient by its name."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_fipo.batching.trajectory import Trajectory, VersionSpan
from megatron_fipo.config import HeadConfig, ModelConfig, OptimizerSettings, ParallelConfig

VOCABULARY = 61
"""Not a multiple of any parallel size, so that the padded part of the vocabulary is real."""


def write_model(
    folder: Path, tied: bool = False, seed: int = 0, layers: int = 4, family: str = "qwen2"
) -> Path:
    """A random model of a family in Hugging Face format, with weights large enough that log-probs differ visibly."""
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config, Qwen3MoeConfig

    torch.manual_seed(seed)
    mixture = {
        "head_dim": 12,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    }
    config_class, variant = {
        "qwen2": (Qwen2Config, {}),
        "qwen3": (Qwen3Config, {"head_dim": 12}),
        "qwen3_moe": (Qwen3MoeConfig, mixture),
        "qwen3_moe-mixed": (Qwen3MoeConfig, {**mixture, "norm_topk_prob": False, "mlp_only_layers": [0]}),
    }[family]
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        **variant,
    )
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
        if name.endswith("mlp.gate.weight"):
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def make_trajectories(count: int, seed: int = 0, longest: int = 40) -> list[Trajectory]:
    """Ragged responses: one token, lengths that no chunk divides, holes, and one without any token of the policy."""
    rng = np.random.default_rng(seed)
    trajectories = []
    for index in range(count):
        prompt, response = int(rng.integers(1, 9)), int(rng.integers(1, longest))
        if index == 0:
            response = 1
        mask = np.ones(response, dtype=int)
        if index % 3 == 1:
            mask[response // 3 : response // 2] = 0
        if index == 4:
            mask[:] = 0
        trajectories.append(
            Trajectory(
                group_id=str(index // 4),
                prompt_ids=rng.integers(0, VOCABULARY, prompt).tolist(),
                response_ids=rng.integers(0, VOCABULARY, response).tolist(),
                response_mask=mask.tolist(),
                rollout_log_probs=[0.0] * response,
                spans=[VersionSpan(0, 0, response)],
                finish_reason="stop",
                advantage=float(rng.normal()),
            )
        )
    return trajectories


def settings(
    folder: Path,
    parallel: ParallelConfig,
    lr: float = 1e-2,
    head: HeadConfig | None = None,
    clip_grad: float = 1.0,
    dtype: str = "float32",
    **model: Any,
) -> dict:
    """Arguments of `RankModel` without the device. `model` are further settings of the model."""
    return {
        "model": ModelConfig(path=str(folder), dtype=dtype, **model),
        "parallel": parallel,
        "head": head or HeadConfig(),
        # Adam divides by the gradient's size; with its usual epsilon a gradient of rounding noise alone would count as any.
        "optimizer": OptimizerSettings(lr=lr, weight_decay=0.1, clip_grad=clip_grad, adam_eps=1e-5),
        "temperature": 0.9,
    }
