"""The figures of a model that planning and validation need, from its config.json alone: no weights, no transformers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fipo.errors import UserError

SUPPORTED_ARCHITECTURES = ("Qwen2ForCausalLM",)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only transformer with gated feed-forward layers and RMSNorm."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    """Key-value groups; equal to `heads` without grouped-query attention."""
    head_dim: int
    ffn: int
    """Width of the feed-forward layer; its first matrix has twice as many rows (gate and up)."""
    vocab: int
    tied: bool
    """The output layer uses the embedding's weights."""
    max_positions: int
    qkv_bias: bool

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, the vocabulary not padded."""
        embeddings = (1 if self.tied else 2) * self.vocab * self.hidden_size
        return embeddings + self.hidden_size + self.layers * self.layer_parameters(tensor_model_parallel_size=1)

    def layer_parameters(self, tensor_model_parallel_size: int) -> int:
        """Parameters of one layer on one tensor-parallel rank: matrices are split, both norms are on every rank."""
        tp = tensor_model_parallel_size
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        split = qkv * (self.hidden_size + self.qkv_bias) + self.heads * self.head_dim * self.hidden_size
        split += 3 * self.ffn * self.hidden_size
        if split % tp:
            raise ValueError(f"{split} parameters of a layer do not split over {tp} tensor-parallel ranks")
        return split // tp + 2 * self.hidden_size


def read_model_shape(folder: str | Path) -> ModelShape:
    """Read `folder/config.json` in Hugging Face format.

    Raises UserError on a missing or unreadable folder or file, an architecture not in `SUPPORTED_ARCHITECTURES`, and missing
    or impossible sizes.
    """
    path = Path(folder) / "config.json"
    values = _read_json(Path(folder), path)
    architectures = values.get("architectures") or ["(none named)"]
    architectures = values.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else "(none named)"
    if name not in SUPPORTED_ARCHITECTURES:
        raise UserError(f"{path}: architecture {name} is not supported; known: {', '.join(SUPPORTED_ARCHITECTURES)}")
    hidden_size, heads = _size(values, "hidden_size", path), _size(values, "num_attention_heads", path)
    return ModelShape(
        hidden_size=hidden_size,
        layers=_size(values, "num_hidden_layers", path),
        heads=heads,
        kv_heads=_size(values, "num_key_value_heads", path),
        head_dim=_size(values, "head_dim", path) if values.get("head_dim") is not None else hidden_size // heads,
        ffn=_size(values, "intermediate_size", path),
        vocab=_size(values, "vocab_size", path),
        tied=bool(values.get("tie_word_embeddings", False)),
        max_positions=_size(values, "max_position_embeddings", path),
        qkv_bias=True,
    )


def _read_json(folder: Path, path: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(
            f"no model folder {folder}; download the model and give its folder (paths start at the current directory)"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"the model folder {folder} has no config.json; give a folder in Hugging Face format") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} has to hold a JSON object")
    return values


def _size(values: dict[str, Any], key: str, path: Path) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{path}: {key} has to be a positive whole number, not {value!r}")
    return value
