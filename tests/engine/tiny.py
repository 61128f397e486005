"""A random Qwen2 model of 30k parameters with one symbol per token id, saved as a Hugging Face folder."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from megatron_fipo.engine.protocol import GenerationRequest

SYMBOLS = ["<pad>", "<eos>", *"0123456789+-*=:;#,abcdefghijkl"]
END = 1


def save_model(folder: Path, seed: int = 0, tied: bool = True, end_token: bool = True) -> Path:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(SYMBOLS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        eos_token_id=END if end_token else None,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(
        models.WordLevel({symbol: index for index, symbol in enumerate(SYMBOLS)}, unk_token="<pad>")
    )
    names = {"pad_token": "<pad>"} | ({"eos_token": "<eos>"} if end_token else {})
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def some_requests(prompts: int = 6, n: int = 4) -> list[GenerationRequest]:
    """`n` requests for each of several prompts of ragged lengths, two of which are equal."""
    ids = [
        tuple(2 + (7 * index + 3 * position) % 30 for position in range(3 + index % 4))
        for index in range(prompts)
    ]
    ids[-1] = ids[0]
    return [
        GenerationRequest(f"request-{index}/{sample}", prompt, seed=1000 * index + sample)
        for index, prompt in enumerate(ids)
        for sample in range(n)
    ]
