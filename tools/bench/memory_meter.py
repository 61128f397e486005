"""Bytes of tensors now and at most: from the allocator on a GPU, counted operation by operation on a CPU."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tools.bench.harness import Bench


class Meter(Protocol):
    """Bytes of tensors."""

    def now(self) -> int:
        """That exist."""

    def peak(self) -> int:
        """The most since `restart`."""

    def restart(self) -> None:
        """Let the peak begin at what exists."""


@contextmanager
def new_meter(bench: Bench) -> Iterator[Meter]:
    """A meter that counts while the block lasts."""
    gc.collect()
    if bench.on_gpu:
        yield AllocatorMeter()
        return
    meter = CpuMeter()
    with meter:
        yield meter


class AllocatorMeter:
    """torch's statistics of the GPU's allocator."""

    def now(self) -> int:
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()

    def restart(self) -> None:
        torch.cuda.reset_peak_memory_stats()


class CpuMeter(TorchDispatchMode):
    """Storages that operations return and that still exist. What an operation frees before it returns is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}
        self._peak = 0
        for tensor in (each for each in gc.get_objects() if isinstance(each, torch.Tensor)):
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf)
        self._peak = max(self._peak, self.now())
        return out

    def _add(self, tensor: torch.Tensor) -> None:
        if tensor.layout is torch.strided and tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    def now(self) -> int:
        self._known = {key: known for key, known in self._known.items() if not known[0].expired()}
        return sum(size for _, size in self._known.values())

    def peak(self) -> int:
        return self._peak

    def restart(self) -> None:
        self._peak = self.now()
