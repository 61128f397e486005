"""Llama 3, 3.1, 3.2 (text), 3.3, and older models of the same form.

No biases, no head norms, rotary scaling 'llama3' or none.
"""

from typing import Any

from megatron_fipo.families.decoder import decoder_architecture, decoder_rules, refuse_true
from megatron_fipo.families.family import Architecture, Family


def translate(config: dict[str, Any]) -> Architecture:
    """As `decoder_architecture`; UserError also for biases."""
    refuse_true(config, "attention_bias", "mlp_bias")
    return decoder_architecture(config)


LLAMA = Family("llama", ("LlamaForCausalLM",), translate, decoder_rules())
