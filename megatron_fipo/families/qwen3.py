"""Qwen3 (dense): a norm on each query and key head, no biases, head size 128 for every hidden size."""

from typing import Any

from megatron_fipo.families.decoder import QK_NORM, decoder_architecture, decoder_rules, refuse_true
from megatron_fipo.families.family import Architecture, Family


def translate(config: dict[str, Any]) -> Architecture:
    """As `decoder_architecture`, with transformers' default for `head_dim`.

    UserError also for sliding windows and biases.
    """
    refuse_true(config, "use_sliding_window", "attention_bias")
    return decoder_architecture({"head_dim": 128} | config, qk_layernorm=True)


QWEN3 = Family("qwen3", ("Qwen3ForCausalLM",), translate, decoder_rules(*QK_NORM))
