"""What a model family is: a translation of its Hugging Face config, and a table of its weights.

A family is data. Its file (see `qwen2.py`) holds one function from `config.json` to `Architecture` and one tuple of `Rule`s, both
built on `dense.py`; `families.py` registers it under the names that Hugging Face puts into `architectures`. Building the model,
converting weights in both directions and counting what each rank will hold need nothing else.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from math import prod
from typing import Any

from megatron_fipo.errors import UserError
from megatron_fipo.families.vocab import padded_vocab_size


class Layout(StrEnum):
    """How the Hugging Face parts of a weight lie in Megatron's parameter, and how tensor parallelism cuts it."""

    REPLICATED = "replicated"
    """One part, the same on every rank."""
    COLUMN = "column"
    """One part, cut along dimension 0 (output features)."""
    ROW = "row"
    """One part, cut along dimension 1 (input features)."""
    VOCABULARY = "vocabulary"
    """One part, padded with zero rows to a multiple, then cut along dimension 0."""
    GATE_UP = "gate_up"
    """Two parts of equal shape; a rank holds its piece of the first above its piece of the second."""
    QKV = "qkv"
    """Three parts; rows are ordered by key-value group, each [its query heads | its key head | its value head]."""


@dataclass(frozen=True)
class Architecture:
    """The numbers that shape a dense decoder, under Megatron-Core's names. `vocab_size` is Hugging Face's, not padded."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    layernorm_epsilon: float
    rotary_base: float
    share_embeddings_and_output_weights: bool
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    rope_scaling_factor: float = 1.0
    """The factor of Llama 3's rotary scaling; 1.0 for plain positions."""
    initializer_range: float = 0.02

    def size(self, dimension: str) -> int:
        """Length of a named dimension of a Hugging Face weight; the names are those that `Part.dimensions` uses."""
        return {
            "hidden": self.hidden_size,
            "ffn": self.ffn_hidden_size,
            "query": self.num_attention_heads * self.kv_channels,
            "key": self.num_query_groups * self.kv_channels,
            "head": self.kv_channels,
            "vocab": self.vocab_size,
        }[dimension]


@dataclass(frozen=True)
class Part:
    """One Hugging Face tensor: its name, with `{layer}` for the layer's index from 0, and its named dimensions."""

    name: str
    dimensions: tuple[str, ...]

    def shape(self, architecture: Architecture) -> tuple[int, ...]:
        return tuple(architecture.size(dimension) for dimension in self.dimensions)


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter and the Hugging Face tensors it is made of.

    `megatron` is the name in the whole model (`{layer}` counts over all pipeline stages), in the form that both layer specs
    share: norms under the linear layer that follows them, as Transformer Engine has them.
    """

    megatron: str
    layout: Layout
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Weight:
    """A rule applied to one layer (or to the model's ends): concrete names and shapes."""

    megatron: str
    layout: Layout
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    layer: int | None = None
    """Counted from 0 over all pipeline stages; None at the model's ends."""

    @property
    def is_layer_matrix(self) -> bool:
        """Whether a layer multiplies by it: neither a norm, nor a bias, nor one of the model's ends."""
        return self.layer is not None and all(len(shape) == 2 for shape in self.shapes)

    @property
    def parameters(self) -> int:
        """Of the whole weight, its vocabulary not padded."""
        return sum(map(prod, self.shapes))

    def parameters_per_rank(self, tensor_model_parallel_size: int) -> int:
        """On each tensor-parallel rank: all of a replicated weight, else an equal share, of a vocabulary with its padding.

        ValueError where the shares would not be equal.
        """
        if self.layout is Layout.REPLICATED:
            return self.parameters
        if self.layout is Layout.VOCABULARY:
            ((rows, *columns),) = self.shapes
            return (
                padded_vocab_size(rows, tensor_model_parallel_size)
                // tensor_model_parallel_size
                * prod(columns)
            )
        share, rest = divmod(self.parameters, tensor_model_parallel_size)
        if rest:
            raise ValueError(
                f"the {self.parameters} parameters of {self.megatron} do not split over {tensor_model_parallel_size} "
                "tensor-parallel ranks"
            )
        return share


@dataclass(frozen=True)
class Family:
    name: str
    architectures: tuple[str, ...]
    """Names in the `architectures` field of config.json that this family reads."""
    translate: Callable[[dict[str, Any]], Architecture]
    """From the parsed config.json; UserError naming the key of a wrong size, or of a variant that the family does not cover."""
    rules: tuple[Rule, ...]

    def weights(self, architecture: Architecture) -> Iterator[Weight]:
        """All weights of the model as Hugging Face stores it, layer after layer; no `lm_head` where embeddings are tied."""
        for layered, group in groupby(self.rules, key=lambda rule: "{layer}" in rule.megatron):
            rules = list(group)
            for layer in range(architecture.num_layers if layered else 1):
                for rule in rules:
                    if rule.megatron == OUTPUT_WEIGHT and architecture.share_embeddings_and_output_weights:
                        continue
                    yield Weight(
                        rule.megatron.format(layer=layer),
                        rule.layout,
                        tuple(part.name.format(layer=layer) for part in rule.parts),
                        tuple(part.shape(architecture) for part in rule.parts),
                        layer if layered else None,
                    )

    def parameters(self, architecture: Architecture) -> int:
        """Of the whole model, the vocabulary not padded."""
        return sum(weight.parameters for weight in self.weights(architecture))


def read_size(config: dict[str, Any], key: str) -> int:
    """`config[key]`, a positive whole number. UserError naming the key for anything else, KeyError where it is missing."""
    value = config[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{key} has to be a positive whole number, not {value!r}")
    return value


EMBEDDING_WEIGHT = "embedding.word_embeddings.weight"
OUTPUT_WEIGHT = "output_layer.weight"
