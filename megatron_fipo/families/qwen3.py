"""Qwen3 (dense): a norm on each query and key head, no biases, head size 128 for every hidden size."""

from typing import Any

from megatron_fipo.families.dense_decoder import QK_NORM, dense_architecture, dense_rules, refuse_true
from megatron_fipo.families.family import Architecture, Family


def translate(config: dict[str, Any]) -> Architecture:
    """As `dense_architecture`, with transformers' default for `head_dim`.

    UserError also for sliding windows and biases.
    """
    refuse_true(config, "use_sliding_window", "attention_bias")
    return dense_architecture({"head_dim": 128} | config, qk_layernorm=True)


QWEN3 = Family("qwen3", ("Qwen3ForCausalLM",), translate, dense_rules(*QK_NORM))
