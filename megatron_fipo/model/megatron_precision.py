"""Precision settings as keywords of Megatron-Core's config objects."""

from typing import Any

import torch

from megatron_fipo.config import ModelConfig, OptimizerSettings


def layer_precision(model: ModelConfig) -> dict[str, Any]:
    """Keywords of `TransformerConfig`."""
    dtype = getattr(torch, model.dtype)
    keywords: dict[str, Any] = {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
    }
    if model.fp8 != "none":
        keywords |= {"fp8": model.fp8, "fp8_recipe": model.fp8_recipe, "fp8_param": model.fp8_param_gather}
    return keywords


def optimizer_precision(model: ModelConfig, settings: OptimizerSettings) -> dict[str, Any]:
    """Keywords of `OptimizerConfig`.

    Megatron-Core offloads to the host through its precision-aware optimizer, so both low-precision state and
    offloading turn that on. Master weights are stored completely, not as the 16 bits that bf16 weights lack:
    no other layout could read such checkpoints.
    """
    state_dtype = getattr(torch, settings.state_dtype)
    return {
        "bf16": model.dtype == "bfloat16",
        "params_dtype": getattr(torch, model.dtype),
        "fp8_recipe": None if model.fp8 == "none" else model.fp8_recipe,
        "use_precision_aware_optimizer": state_dtype is not torch.float32 or settings.cpu_offload > 0,
        "exp_avg_dtype": state_dtype,
        "exp_avg_sq_dtype": state_dtype,
        "store_param_remainders": False,
        "optimizer_cpu_offload": settings.cpu_offload > 0,
        "optimizer_offload_fraction": settings.cpu_offload,
        "overlap_cpu_optimizer_d2h_h2d": settings.cpu_offload > 0,
    }
