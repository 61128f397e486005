"""Stands in for NCCL: a queue per engine that `broadcast` fills.

As with NCCL, losing the other side raises no error.
"""

import queue
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from megatron_fipo.weight_sync.checksum import tensor_checksum


class WireEngine:
    """An engine that takes tensors from its queue in the announced order."""

    def __init__(self) -> None:
        self.wire: queue.Queue[Tensor] = queue.Queue()
        self.inits: list[dict[str, Any]] = []
        self.held: dict[str, Tensor] = {}
        self.version = 0

    def nccl_init(self, info: dict[str, Any]) -> None:
        self.inits.append(info)

    def begin_weight_update(self, check: bool) -> None:
        self.held, self.check = {}, check

    def nccl_update(self, info: dict[str, Any]) -> None:
        for name, shape in zip(info["names"], info["shapes"], strict=True):
            self.held[name] = self.wire.get(timeout=30).view(tuple(shape))

    def finish_weight_update(self, version: int) -> dict[str, str]:
        self.version = version
        return (
            {name: tensor_checksum(name, tensor) for name, tensor in self.held.items()} if self.check else {}
        )


def broadcast(pairs: Iterable[tuple[str, Tensor]], engines: Mapping[int, WireEngine]) -> Iterator[str]:
    """Send to every engine, one tensor at a time; yields the name of each tensor sent."""
    for name, tensor in pairs:
        for engine in engines.values():
            engine.wire.put(tensor.clone())
        yield name
