"""How long the phases of an iteration take."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def clock(seconds: dict[str, float], name: str, device: torch.device | None = None) -> Iterator[None]:
    """Put the wall time of the block into `seconds[name]`; with `device`, until a GPU has done all that it was given."""
    start = time.perf_counter()
    yield
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds[name] = time.perf_counter() - start
