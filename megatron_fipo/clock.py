"""Wall time of a block."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@contextmanager
def clock(seconds: dict[str, float], name: str, device: "torch.device | None" = None) -> Iterator[None]:
    """Add the wall time of the block to `seconds[name]`; with a GPU as `device`, until its queued work is done."""
    start = time.perf_counter()
    yield
    if device is not None and device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
