"""Copies within a device, between device and host, and to the disk."""

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_fipo.calibrate.messages import Measured, Message, Skipped
from megatron_fipo.calibrate.timing import timed

COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}
LINK_BYTES = {"cuda": 2**28, "cpu": 2**27}
SHORT_BYTES = 2**12
FILE_BYTES = 2**28
BLOCK_BYTES = 2**24
FREE_SHARE = 0.1
"""Share of the free space of the disk that is written at most."""
FILES = 3


def measure(device: torch.device, budget_s: float) -> Iterator[Message]:
    """Features: of `memory` (bytes read and written,), of `host` (transfers, bytes)."""
    yield _within_device(device, budget_s / 2)
    for size in (SHORT_BYTES, LINK_BYTES[device.type]):
        yield from _over_host(size, device, budget_s / 4)


def _within_device(device: torch.device, budget_s: float) -> Message:
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return Measured("memory", (2.0 * source.nbytes,), timed(lambda: target.copy_(source), device, budget_s))


def _over_host(size: int, device: torch.device, budget_s: float) -> Iterator[Message]:
    """Down to pinned host memory, and up."""
    pinned = device.type == "cuda"
    here = torch.ones(size, dtype=torch.uint8, device=device)
    there = torch.ones(size, dtype=torch.uint8, pin_memory=pinned)
    for target, source in ((there, here), (here, there)):

        def copy(target: torch.Tensor = target, source: torch.Tensor = source) -> None:
            target.copy_(source, non_blocking=pinned)

        yield Measured("host", (1.0, float(size)), timed(copy, device, budget_s / 2))


def write_files(folder: Path, budget_s: float) -> Iterator[Message]:
    """`disk` with (bytes,). Files without a name, so that none is left, each written and synced."""
    status = os.statvfs(folder)
    size = min(FILE_BYTES, int(FREE_SHARE * status.f_bavail * status.f_frsize) // BLOCK_BYTES * BLOCK_BYTES)
    if size < BLOCK_BYTES:
        yield Skipped("disk", f"{folder} has too little free space")
        return
    block, until = os.urandom(BLOCK_BYTES), time.perf_counter() + budget_s
    seconds: list[float] = []
    while len(seconds) < FILES and (not seconds or time.perf_counter() + seconds[-1] < until):
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            start = time.perf_counter()
            written = 0
            while written < size:
                written += file.write(block)
                if not seconds and time.perf_counter() > until:
                    break
            os.fsync(file.fileno())
            seconds.append((time.perf_counter() - start) * size / written)
    yield Measured("disk", (float(size),), tuple(seconds))
