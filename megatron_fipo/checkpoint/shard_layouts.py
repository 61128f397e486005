"""Conversion between Hugging Face tensors and Megatron's tensor-parallel shards; the weights of each rank.

Each `Layout` is a pair of functions. `shard` reads a rank's shard from the Hugging Face tensors of a weight.
`join` concatenates the shards of all ranks and separates the complete Hugging Face tensors again. They are
exact inverses.
"""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.models.common.language_module.language_module import LanguageModule

from megatron_fipo.families.family import (
    EMBEDDING_WEIGHT,
    OUTPUT_WEIGHT,
    Architecture,
    Family,
    Layout,
    Weight,
    padded_vocab_size,
)
from megatron_fipo.model.layer_spec import shared_names
from megatron_fipo.model.mcore import layer_of


class TensorSource(Protocol):
    """A tensor, or a lazy slice of a safetensors file that reads only the indexed elements."""

    def __getitem__(self, index: Any) -> torch.Tensor: ...


class _Converter(Protocol):
    def shard(
        self, tensors: Sequence[TensorSource], architecture: Architecture, rank: int, size: int
    ) -> torch.Tensor: ...

    def join(self, shards: Sequence[torch.Tensor], architecture: Architecture) -> list[torch.Tensor]: ...


class _Replicated:
    def shard(
        self, tensors: Sequence[TensorSource], architecture: Architecture, rank: int, size: int
    ) -> torch.Tensor:
        return tensors[0][:]

    def join(self, shards: Sequence[torch.Tensor], architecture: Architecture) -> list[torch.Tensor]:
        return [shards[0]]


class _Column:
    def shard(
        self, tensors: Sequence[TensorSource], architecture: Architecture, rank: int, size: int
    ) -> torch.Tensor:
        return _rows(tensors[0], rank, size)

    def join(self, shards: Sequence[torch.Tensor], architecture: Architecture) -> list[torch.Tensor]:
        return [torch.cat(list(shards))]


class _Row:
    def shard(
        self, tensors: Sequence[TensorSource], architecture: Architecture, rank: int, size: int
    ) -> torch.Tensor:
        width = _shape(tensors[0])[1] // size
        return tensors[0][:, rank * width : (rank + 1) * width]

    def join(self, shards: Sequence[torch.Tensor], architecture: Architecture) -> list[torch.Tensor]:
        return [torch.cat(list(shards), dim=1)]


class _Vocabulary:
    def shard(
        self, tensors: Sequence[TensorSource], architecture: Architecture, rank: int, size: int
    ) -> torch.Tensor:
        rows, width = _shape(tensors[0])
        height = padded_vocab_size(rows, size) // size
        first, last = min(rank * height, rows), min((rank + 1) * height, rows)
        values = tensors[0][first:last]
        return torch.cat((values, values.new_zeros(height - len(values), width)))

    def join(self, shards: Sequence[torch.Tensor], architecture: Architecture) -> list[torch.Tensor]:
        return [torch.cat(list(shards))[: architecture.vocab_size]]


class _GateUp:
    def shard(
        self, tensors: Sequence[TensorSource], architecture: Architecture, rank: int, size: int
    ) -> torch.Tensor:
        return torch.cat([_rows(tensor, rank, size) for tensor in tensors])

    def join(self, shards: Sequence[torch.Tensor], architecture: Architecture) -> list[torch.Tensor]:
        halves = [shard.chunk(2) for shard in shards]
        return [torch.cat([half[which] for half in halves]) for which in (0, 1)]


class _Qkv:
    def shard(
        self, tensors: Sequence[TensorSource], architecture: Architecture, rank: int, size: int
    ) -> torch.Tensor:
        groups = architecture.num_query_groups // size
        rows = [_rows(tensor, rank, size) for tensor in tensors]
        return torch.cat([values.unflatten(0, (groups, -1)) for values in rows], dim=1).flatten(0, 1)

    def join(self, shards: Sequence[torch.Tensor], architecture: Architecture) -> list[torch.Tensor]:
        head = architecture.kv_channels
        queries = head * (architecture.num_attention_heads // architecture.num_query_groups)
        grouped = torch.cat(list(shards)).unflatten(0, (architecture.num_query_groups, -1))
        return [values.flatten(0, 1) for values in grouped.split([queries, head, head], dim=1)]


LAYOUTS: dict[Layout, _Converter] = {
    Layout.REPLICATED: _Replicated(),
    Layout.COLUMN: _Column(),
    Layout.ROW: _Row(),
    Layout.VOCABULARY: _Vocabulary(),
    Layout.GATE_UP: _GateUp(),
    Layout.QKV: _Qkv(),
}


def shard(
    weight: Weight, tensors: Sequence[TensorSource], architecture: Architecture, rank: int, size: int
) -> torch.Tensor:
    """The shard of tensor-parallel rank `rank` of `size`. `tensors` are in the rule's order.

    Rank and size are those of expert-tensor parallelism for a weight of an expert.
    """
    return LAYOUTS[weight.layout].shard(tensors, architecture, rank, size)


def join(weight: Weight, shards: Sequence[torch.Tensor], architecture: Architecture) -> list[torch.Tensor]:
    """The complete Hugging Face tensors (in the rule's order) from all shards, without vocabulary padding."""
    return LAYOUTS[weight.layout].join(shards, architecture)


def _shape(source: TensorSource) -> Sequence[int]:
    if isinstance(source, torch.Tensor):
        return source.shape
    return source.get_shape()  # type: ignore[attr-defined]


def _rows(source: TensorSource, rank: int, size: int) -> torch.Tensor:
    height = _shape(source)[0] // size
    return source[rank * height : (rank + 1) * height]


@dataclass(frozen=True)
class ModelMap:
    """The weights of the model and the parameters of this rank's chunks."""

    family: Family
    architecture: Architecture
    weights: list[Weight]
    """All weights of the complete model, in Hugging Face order; the same list on every rank."""
    parameters: dict[str, torch.nn.Parameter]
    """This rank's parameters, by their name in the complete model."""

    def local(self) -> list[tuple[Weight, torch.nn.Parameter]]:
        """The weights to load on this rank.

        The last stage's copy of a tied embedding is a second load of the embedding.
        """
        pairs = [
            (weight, self.parameters[weight.megatron])
            for weight in self.weights
            if weight.megatron in self.parameters
        ]
        if self.architecture.share_embeddings_and_output_weights and OUTPUT_WEIGHT in self.parameters:
            embedding = next(weight for weight in self.weights if weight.megatron == EMBEDDING_WEIGHT)
            pairs.append((embedding, self.parameters[OUTPUT_WEIGHT]))
        return pairs


def map_model(model_chunks: Sequence[torch.nn.Module]) -> ModelMap:
    """Match the parameters of this rank's chunks (wrapped or not) with the family's table.

    ValueError naming a parameter that is not in the table, so that no parameter is skipped silently.
    """
    chunks = [_unwrap(chunk) for chunk in model_chunks]
    family, architecture = chunks[0].family, chunks[0].architecture
    weights = list(family.weights(architecture))
    parameters = {name: parameter for chunk in chunks for name, parameter in _global_parameters(chunk)}
    unknown = set(parameters) - {weight.megatron for weight in weights} - {OUTPUT_WEIGHT}
    if unknown:
        raise ValueError(f"the table of family {family.name} has no rule for {', '.join(sorted(unknown))}")
    return ModelMap(family, architecture, weights, parameters)


def _unwrap(chunk: Any) -> Any:
    while not isinstance(chunk, LanguageModule):
        chunk = chunk.module
    return chunk


def _global_parameters(chunk: LanguageModule) -> list[tuple[str, torch.nn.Parameter]]:
    """Parameters by their name in the complete model: layers over all stages, experts over all ranks, norms as in
    `shared_names`."""
    named = []
    for name, parameter in chunk.named_parameters():
        if name.startswith("decoder.layers."):
            index, rest = name.removeprefix("decoder.layers.").split(".", 1)
            layer = layer_of(chunk.decoder.layers[int(index)])
            for portable, shared in shared_names(chunk.architecture.has_experts(layer)).items():
                if rest.startswith(portable):
                    rest = shared + rest.removeprefix(portable)
            name = f"decoder.layers.{layer}.{_of_all_experts(rest, chunk.architecture)}"
        named.append((name, parameter))
    return named


_EXPERT_NAMES = (
    re.compile(r"mlp\.experts\.local_experts\.(?P<expert>\d+)\.(?P<linear>linear_fc[12])\.weight"),
    re.compile(r"mlp\.experts\.(?P<linear>linear_fc[12])\.weight(?P<expert>\d+)"),
)
"""Of a rank's expert, in the portable layers and in Transformer Engine's."""


def _of_all_experts(name: str, architecture: Architecture) -> str:
    """The name of a layer's parameter with the expert counted over all expert-parallel ranks.

    Example: of 8 experts on 2 ranks, expert 1 of rank 1 is expert 5.
    """
    found = next(filter(None, (pattern.fullmatch(name) for pattern in _EXPERT_NAMES)), None)
    if found is None or architecture.experts is None:
        return name
    on_rank = architecture.experts.count // parallel_state.get_expert_model_parallel_world_size()
    expert = parallel_state.get_expert_model_parallel_rank() * on_rank + int(found["expert"])
    return f"mlp.experts.local_experts.{expert}.{found['linear']}.weight"
