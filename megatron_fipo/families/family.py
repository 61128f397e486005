"""The definition of a model family: a translation of its Hugging Face config, and a table of its weights.

A family is data. Its file (see `qwen2.py`) has one function from `config.json` to `Architecture` and one
tuple of `Rule`s, both built on `decoder.py`. `registry.py` registers it under the names that Hugging
Face writes to `architectures`. Building the model, converting weights in both directions and computing the
memory of each rank need nothing else.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from math import inf, prod
from typing import Any

from megatron_fipo.errors import UserError

EMBEDDING_WEIGHT = "embedding.word_embeddings.weight"
OUTPUT_WEIGHT = "output_layer.weight"
"""Megatron-Core's names of the parameters at the two ends of the model."""


class Layout(StrEnum):
    """How a Megatron parameter consists of Hugging Face tensors, and how tensor parallelism shards it."""

    REPLICATED = "replicated"
    """One tensor, the same on every rank."""
    COLUMN = "column"
    """One tensor, sharded along dimension 0 (output features)."""
    ROW = "row"
    """One tensor, sharded along dimension 1 (input features)."""
    VOCABULARY = "vocabulary"
    """One tensor, padded with zero rows to a multiple, then sharded along dimension 0."""
    GATE_UP = "gate_up"
    """Two tensors of equal shape. A rank has its rows of the first, followed by its rows of the second."""
    QKV = "qkv"
    """Three tensors. Rows are ordered by key-value group: [query heads of the group | key head | value
    head]."""


class Layers(StrEnum):
    """The layers that have a parameter."""

    ALL = "all"
    DENSE = "dense"
    """Those with a feed-forward part."""
    EXPERTS = "experts"
    """Those with a mixture of experts."""


@dataclass(frozen=True)
class Experts:
    """The mixture of experts that replaces the feed-forward part of some layers. Its router is a top-k softmax."""

    count: int
    per_token: int
    """Experts that process a token (top-k)."""
    ffn_hidden_size: int
    """Of one expert."""
    normalized: bool
    """Whether the weights of a token's experts sum to 1: a softmax over the chosen experts, not over all."""
    dense_layers: tuple[int, ...] = ()
    """Layers without experts, counted from 0."""


@dataclass(frozen=True)
class Architecture:
    """The sizes of a decoder, under Megatron-Core's names.

    `vocab_size` is Hugging Face's, without padding.
    """

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
    experts: Experts | None = None
    """None for a dense decoder."""

    def has_experts(self, layer: int) -> bool:
        """Whether layer `layer`, counted from 0, has experts in the place of a feed-forward part."""
        return self.experts is not None and layer not in self.experts.dense_layers

    def size(self, dimension: str) -> int:
        """Length of a named dimension of a Hugging Face weight (see `HfTensor.dimensions`)."""
        experts = (
            {}
            if self.experts is None
            else {"experts": self.experts.count, "expert_ffn": self.experts.ffn_hidden_size}
        )
        return {
            **experts,
            "hidden": self.hidden_size,
            "ffn": self.ffn_hidden_size,
            "query": self.num_attention_heads * self.kv_channels,
            "key": self.num_query_groups * self.kv_channels,
            "head": self.kv_channels,
            "vocab": self.vocab_size,
        }[dimension]


@dataclass(frozen=True)
class HfTensor:
    """One Hugging Face tensor of a rule."""

    name: str
    """With `{layer}` for the layer's index and `{expert}` for the expert's, from 0."""
    dimensions: tuple[str, ...]
    """Names that `Architecture.size` maps to lengths."""

    def shape(self, architecture: Architecture) -> tuple[int, ...]:
        return tuple(architecture.size(dimension) for dimension in self.dimensions)


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter and the Hugging Face tensors it consists of.

    `megatron` is the name in the complete model (`{layer}` counts over all pipeline stages, `{expert}` over all
    expert-parallel ranks), in the form that both layer specs share: a norm is named as part of the linear layer
    that follows it, as in Transformer Engine.
    """

    megatron: str
    layout: Layout
    tensors: tuple[HfTensor, ...]
    layers: Layers = Layers.ALL


@dataclass(frozen=True)
class Weight:
    """A rule applied to one layer (or to the model's ends): actual names and shapes."""

    megatron: str
    layout: Layout
    names: tuple[str, ...]
    """Hugging Face tensors, in the rule's order."""
    shapes: tuple[tuple[int, ...], ...]
    """Of these tensors."""
    layer: int | None = None
    """Counted from 0 over all pipeline stages; None at the model's ends."""
    expert: int | None = None
    """Counted from 0 over all expert-parallel ranks; None outside experts."""

    @property
    def is_layer_matrix(self) -> bool:
        """Whether it is a matrix of a layer: not a norm, a bias, or a weight at the model's ends."""
        return self.layer is not None and all(len(shape) == 2 for shape in self.shapes)

    @property
    def parameters(self) -> int:
        """Number of parameters of the complete weight, without vocabulary padding."""
        return sum(map(prod, self.shapes))

    def parameters_per_rank(self, tensor_model_parallel_size: int) -> int:
        """Parameters on each tensor-parallel rank: all if replicated, else an equal share (padding included).

        For a weight of an expert the size is that of expert-tensor parallelism.

        ValueError if the shares would not be equal.
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
                f"the {self.parameters} parameters of {self.megatron} do not divide over "
                f"{tensor_model_parallel_size} tensor-parallel ranks"
            )
        return share


@dataclass(frozen=True)
class Family:
    """A set of models with the same config keys and the same weights."""

    name: str
    """The `model_type` in config.json."""
    architectures: tuple[str, ...]
    """Names in the `architectures` field of config.json that belong to this family."""
    translate: Callable[[dict[str, Any]], Architecture]
    """From the parsed config.json. UserError naming the key of a wrong size or of an unsupported variant."""
    rules: tuple[Rule, ...]

    def weights(self, architecture: Architecture) -> Iterator[Weight]:
        """All weights, layer by layer and in it expert by expert; no `lm_head` if embeddings are tied."""
        for layered, group in groupby(self.rules, key=lambda rule: "{layer}" in rule.megatron):
            rules = list(group)
            for layer in range(architecture.num_layers) if layered else [None]:
                yield from _layer_weights(rules, architecture, layer)

    def parameters(self, architecture: Architecture) -> int:
        """Number of parameters of the complete model, without vocabulary padding."""
        return sum(weight.parameters for weight in self.weights(architecture))


def _layer_weights(rules: Sequence[Rule], architecture: Architecture, layer: int | None) -> Iterator[Weight]:
    """The weights of one layer, or those at the model's ends if it is None."""
    kind = Layers.EXPERTS if layer is not None and architecture.has_experts(layer) else Layers.DENSE
    tied = architecture.share_embeddings_and_output_weights
    present = [
        rule
        for rule in rules
        if rule.layers in (Layers.ALL, kind) and not (tied and rule.megatron == OUTPUT_WEIGHT)
    ]
    for routed, group in groupby(present, key=lambda rule: "{expert}" in rule.megatron):
        of_expert = list(group)
        count = architecture.experts.count if routed and architecture.experts else 1
        for expert in range(count):
            for rule in of_expert:
                yield Weight(
                    rule.megatron.format(layer=layer, expert=expert),
                    rule.layout,
                    tuple(tensor.name.format(layer=layer, expert=expert) for tensor in rule.tensors),
                    tuple(tensor.shape(architecture) for tensor in rule.tensors),
                    layer,
                    expert if routed else None,
                )


def read_size(config: dict[str, Any], key: str) -> int:
    """`config[key]`, a positive integer.

    UserError naming the key for anything else, KeyError if it is missing.
    """
    value = config[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{key} has to be a positive integer, not {value!r}")
    return value


def read_number(config: dict[str, Any], key: str) -> float:
    """`config[key]`, a positive finite number. Errors as `read_size`."""
    value = config[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < inf:
        raise UserError(f"{key} has to be a positive number, not {value!r}")
    return float(value)


def read_flag(config: dict[str, Any], key: str) -> bool:
    """`config[key]`, false if it is missing. UserError naming the key if it is neither true nor false."""
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise UserError(f"{key} has to be true or false, not {value!r}")
    return value


def padded_vocab_size(vocab_size: int, tensor_model_parallel_size: int) -> int:
    """The vocabulary size rounded up, so that every rank has the same number of embedding and output rows.

    Vocabularies above 1,024 are padded to a multiple of 128 rows per rank, which keeps matrix kernels fast;
    smaller ones (test models) only as far as necessary. Padding rows exist in memory only: no Hugging Face
    folder has them, and the head never scores them.
    """
    rows_per_rank = 128 if vocab_size > 1024 else 1
    multiple = rows_per_rank * tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple
