"""Qwen2 and Qwen2.5 (dense): biases on query, key and value."""

from typing import Any

from megatron_fipo.families.decoder import QKV_BIAS, decoder_architecture, decoder_rules, refuse_true
from megatron_fipo.families.family import Architecture, Family


def translate(config: dict[str, Any]) -> Architecture:
    """As `decoder_architecture`; UserError also for sliding windows."""
    refuse_true(config, "use_sliding_window")
    return decoder_architecture(config, add_qkv_bias=True)


QWEN2 = Family("qwen2", ("Qwen2ForCausalLM",), translate, decoder_rules(*QKV_BIAS))
