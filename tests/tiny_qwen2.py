"""A Qwen2 model with random weights, and a tokenizer of one symbol per id, as files of a Hugging Face folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

SYMBOLS = ["<pad>", "<eos>", *"0123456789+-*=:;#,abcdefghijkl"]
END = 1
"""Id of the end token."""


def save_qwen2(folder: Path, seed: int, *, end_token: bool = True, **config: Any) -> Path:
    """The model; config: fields of its configuration, by default two layers with a vocabulary of `SYMBOLS`."""
    torch.manual_seed(seed)
    defaults = {
        "vocab_size": len(SYMBOLS),
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "eos_token_id": END if end_token else None,
        "bos_token_id": None,
    }
    Qwen2ForCausalLM(Qwen2Config(**defaults | config)).save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path, symbols: Sequence[str] = SYMBOLS, end_token: bool = True) -> None:
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    names = {"pad_token": "<pad>", "unk_token": "<pad>"} | ({"eos_token": "<eos>"} if end_token else {})
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def ragged_prompts(count: int) -> list[tuple[int, ...]]:
    """Prompts of 3 to 6 ids."""
    return [
        tuple(2 + (7 * index + 3 * position) % 30 for position in range(3 + index % 4))
        for index in range(count)
    ]
