"""The tokenizer of a process that needs no tensors."""

import sys
from typing import Any

from megatron_fipo.families.registry import read_architecture


def load_without_torch(model_path: str, trust_remote_code: bool) -> tuple[Any, int]:
    """The tokenizer of a model folder, and its model's vocabulary size.

    transformers imports torch if it finds it. Without it this process starts twice as fast and takes less than half of the
    memory. The user's code may import it later.
    """
    from megatron_fipo.checkpoint.tokenizer import load_tokenizer

    if not trust_remote_code:
        sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    vocab_size = read_architecture(model_path).vocab_size
    tokenizer, _ = load_tokenizer(model_path, trust_remote_code, vocab_size)
    if sys.modules.get("torch", 0) is None:
        del sys.modules["torch"]
    return tokenizer, vocab_size
