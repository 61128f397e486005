"""The stacked dimensions of a checkpoint's tensors (layers, experts) as ordinary dimensions.

Megatron-Core keeps them apart from the dimensions of a parameter (`prepend_axis_num`). Such tensors it converts into
torch's sharded tensors, which compare the pieces of all ranks with each other: minutes for 48 layers of 128 experts, on
every rank, for each save and load. With a dimension of length 1 for each the checkpoint is the same.
"""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory


def with_ordinary_axes(item: Any) -> Any:
    """The same part of a checkpoint without prepended dimensions. Its data are views."""
    if isinstance(item, ShardedTensorFactory):
        return _ordinary_factory(item)
    if not isinstance(item, ShardedTensor) or not item.prepend_axis_num:
        return item
    shape = (*[1] * item.prepend_axis_num, *item.local_shape)
    data = None if item.data is None else item.data.view(shape)
    return replace(item, data=data, local_shape=shape, prepend_axis_num=0)


def without_leading(tensor: torch.Tensor, dimensions: int) -> torch.Tensor:
    """The last `dimensions` dimensions of a tensor whose others have length 1."""
    return tensor.view(tensor.shape[tensor.dim() - dimensions :])


def _ordinary_factory(factory: ShardedTensorFactory) -> ShardedTensorFactory:
    """For a parameter that a checkpoint has in parts (gate and up projection)."""
    dimensions = factory.data.dim()

    def build(*arguments: Any) -> list[Any]:
        return [with_ordinary_axes(part) for part in factory.build_fn(*arguments)]

    def merge(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return factory.merge_fn([without_leading(part, dimensions) for part in parts])

    return replace(factory, build_fn=build, merge_fn=merge)
