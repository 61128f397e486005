"""Seconds of a call, repeated: until the work on the device is done, within a time budget.

A rank without a GPU is one thread that never waits, so there the processor's time is taken: it is the wall time of an idle
machine, and other processes disturb it less.
"""

import time
from collections.abc import Callable

import torch

SAMPLES = 15
LEAST_SAMPLES = 3
SAMPLE_S = 2e-3
"""A sample lasts at least so long: short calls are repeated within it."""


def timed(call: Callable[[], object], device: torch.device, budget_s: float) -> tuple[float, ...]:
    """Seconds per call, for `LEAST_SAMPLES` to `SAMPLES` samples. Two calls before them are not counted."""
    begin = time.perf_counter()
    _elapsed(call, 1, device)
    repeats = max(1, round(SAMPLE_S / max(_elapsed(call, 1, device), 1e-9)))
    samples: list[float] = []
    while len(samples) < LEAST_SAMPLES or (len(samples) < SAMPLES and time.perf_counter() - begin < budget_s):
        samples.append(_elapsed(call, repeats, device) / repeats)
    return tuple(samples)


def _elapsed(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    clock = clock_of(device)
    finish(device)
    start = clock()
    for _ in range(repeats):
        call()
    finish(device)
    return clock() - start


def clock_of(device: torch.device) -> Callable[[], float]:
    """The clock that measures work of this process on the device."""
    return time.perf_counter if device.type == "cuda" else time.process_time


def finish(device: torch.device) -> None:
    """Wait until the device has done all of its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
