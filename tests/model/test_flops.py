"""The count of operations compared with torch's own counter on the models of `transformers`."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megatron_fipo.families.flops import ModelFlops, model_flops
from megatron_fipo.families.registry import find_family

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",  # torch counts it completely, pairs that the causal mask hides included
}
MODELS = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=False)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)),
}
SEQUENCES, LENGTH = 2, 10


def counted(model: PreTrainedModel, backward: bool) -> int:
    """Torch's count of a pass over the sequences, without the product that makes the angles of the rotation."""
    ids = torch.randint(0, SIZES["vocab_size"], (SEQUENCES, LENGTH))
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=ids).logits
        if backward:
            logits.sum().backward()
    counts = counter.get_flop_counts()
    angles = [sum(ops.values()) for name, ops in counts.items() if name.endswith("rotary_emb")]
    return counter.get_total_flops() - sum(angles)


@pytest.mark.parametrize("name", MODELS)
def test_torch_counts_the_same(name: str) -> None:
    model = MODELS[name]()
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    family = find_family(config)
    flops = model_flops(family, family.translate(config))
    tokens = SEQUENCES * LENGTH
    forward = flops.per_token * tokens + flops.per_pair * tokens * LENGTH + flops.per_row * tokens
    assert counted(model, backward=False) == forward
    assert counted(model, backward=True) == 3 * forward


def test_sequences_rows_and_half_of_the_pairs_are_counted() -> None:
    flops = ModelFlops(per_token=100, per_pair=10, per_row=1)
    assert flops.forward([4, 6], rows=7) == 100 * 10 + 10 * (16 + 36) / 2 + 7
