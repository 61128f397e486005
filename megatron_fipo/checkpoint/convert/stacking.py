"""Under which key, and at which index, a distributed checkpoint of Megatron-Core has a weight.

Megatron-Core stacks all layers of a parameter in one tensor, and in it all experts of a layer:

    decoder.layers.7.mlp.linear_fc2.weight [H, F]
        = index [7] of decoder.layers.mlp.linear_fc2.weight [layers, H, F]
    decoder.layers.7.mlp.experts.local_experts.3.linear_fc2.weight [H, F]
        = index [7, 3] of decoder.layers.mlp.experts.experts.linear_fc2.weight [layers, experts, H, F]

A model with experts in some layers only has a tensor per layer, in which experts are stacked:

        = index [3] of decoder.layers.7.mlp.experts.experts.linear_fc2.weight [experts, H, F]
"""

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_fipo.families.family import Architecture, Weight


@dataclass(frozen=True)
class Place:
    """Of a weight in a checkpoint."""

    key: str
    """Name of the stored tensor."""
    index: tuple[int, ...]
    """In the stacked dimensions, which come first: layer and expert, one of them, or none."""
    lengths: tuple[int, ...]
    """Of these dimensions."""

    @property
    def extra_state_key(self) -> str:
        """The key of Megatron-Core's `_extra_state` of the module with this weight."""
        module = self.key.rpartition(".")[0]
        index, lengths = (".".join(map(str, of)) for of in (self.index or (0,), self.lengths or (1,)))
        return f"{module}._extra_state/shard_{index}_{lengths}"


def place_of(weight: Weight, architecture: Architecture) -> Place:
    """The place of a weight."""
    key, index, lengths = weight.megatron, [], []
    if weight.layer is not None and not _has_layers_of_two_kinds(architecture):
        key = key.replace(f".layers.{weight.layer}.", ".layers.", 1)
        index.append(weight.layer)
        lengths.append(architecture.num_layers)
    if weight.expert is not None and architecture.experts is not None:
        key = key.replace(f".local_experts.{weight.expert}.", ".experts.", 1)
        index.append(weight.expert)
        lengths.append(architecture.experts.count)
    return Place(key, tuple(index), tuple(lengths))


def extra_state_keys(weights: Iterable[Weight], architecture: Architecture) -> list[str]:
    """Keys of the `_extra_state` of Megatron-Core's linear layers (for FP8): empty here, but required."""
    keys = (
        place_of(weight, architecture).extra_state_key for weight in weights if ".linear_" in weight.megatron
    )
    return list(dict.fromkeys(keys))


def _has_layers_of_two_kinds(architecture: Architecture) -> bool:
    return architecture.experts is not None and bool(architecture.experts.dense_layers)
