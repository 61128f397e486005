"""Qwen2 and Qwen2.5 (dense): biases on query, key and value."""

from typing import Any

from megatron_fipo.families.dense_decoder import QKV_BIAS, dense_architecture, dense_rules, refuse_true
from megatron_fipo.families.family import Architecture, Family


def translate(config: dict[str, Any]) -> Architecture:
    """As `dense_architecture`; UserError also for sliding windows."""
    refuse_true(config, "use_sliding_window")
    return dense_architecture(config, add_qkv_bias=True)


QWEN2 = Family("qwen2", ("Qwen2ForCausalLM",), translate, dense_rules(*QKV_BIAS))
