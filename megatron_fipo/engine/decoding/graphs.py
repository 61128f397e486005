"""How steps run: launched by the host, or replayed from CUDA graphs."""

from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch

MOST_GRAPHS = 64
"""The longest unused one makes place for another."""


class Runner(Protocol):
    """Runs steps. Equal keys mean the same operations on the same memory."""

    def run(self, key: Hashable, step: Callable[[], None]) -> None: ...

    def release(self) -> None:
        """Forget every key: memory is freed."""


class Launches:
    """The host launches each operation."""

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        step()

    def release(self) -> None:
        """Does nothing."""


class Graphs:
    """One CUDA graph for each key, with one memory pool for all of them: none leaves a result in it.

    The first step of a key is launched by the host, which also loads its kernels. The second one is captured, then replayed.
    """

    def __init__(self) -> None:
        self._graphs: dict[Hashable, Any] = {}
        """In the order of their last use. None: was launched once."""
        self._pool: Any = None

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """RuntimeError if a step waits for the device, which cannot be captured."""
        if key not in self._graphs:
            if len(self._graphs) == MOST_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            step()
            self._graphs[key] = None
            return
        graph = self._graphs.pop(key) or self._capture(step)
        self._graphs[key] = graph
        graph.replay()

    def release(self) -> None:
        self._graphs.clear()
        self._pool = None
        torch.cuda.empty_cache()

    def _capture(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        usual = torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads of the actor may call CUDA meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                step()
        except RuntimeError:
            torch.cuda.set_stream(usual)  # torch leaves the capturing one current
            raise
        return graph


def free_bytes() -> int:
    """Memory of the current GPU that this process may still allocate."""
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
