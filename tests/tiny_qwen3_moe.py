"""A Qwen3-MoE model with random weights, as files of a Hugging Face folder with the tokenizer of `tiny_qwen2`."""

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.tiny_qwen2 import END, SYMBOLS, save_tokenizer

EXPERTS = 8


def save_qwen3_moe(folder: Path, seed: int, **config: Any) -> Path:
    """A dense layer and two with experts. Routers are sure of their choice, so that rounding does not change it."""
    save_tokenizer(folder)
    torch.manual_seed(seed)
    defaults = {
        "vocab_size": len(SYMBOLS),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "mlp_only_layers": [0],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
        "eos_token_id": END,
        "bos_token_id": None,
    }
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**defaults | config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(8 if name.endswith("mlp.gate.weight") else 1)
    model.save_pretrained(folder)
    return folder
