"""An all-reduce between the GPUs of this node, or between two processes of a machine without GPUs."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_fipo.calibrate.messages import Measured, Message
from megatron_fipo.network import interface_of, node_address, socket_variables

SIZES = {"cuda": (2**12, 2**24, 2**29), "cpu": (2**12, 2**19, 2**24)}
"""Bytes."""
REPEATS = 10
SAMPLES = 7


def measure(rank: int, ranks: int, store: Path, gpus: bool, budget_s: float) -> Iterator[Message]:
    """On rank 0: `node` with the features (steps of the ring, bytes that a rank sends) of all-reduces of several sizes.

    A ring of p ranks takes 2 (p - 1) steps, and each rank sends 2 (p - 1) / p of the bytes.
    """
    device = torch.device("cuda", rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    os.environ |= socket_variables(interface_of(node_address()), os.environ)
    dist.init_process_group(
        "nccl" if gpus else "gloo",
        store=dist.FileStore(str(store), ranks),
        rank=rank,
        world_size=ranks,
        device_id=device if gpus else None,
    )
    try:
        for size in SIZES[device.type]:
            values = torch.zeros(size // 4, device=device)
            seconds = _samples(values, device, budget_s / len(SIZES[device.type]))
            if rank == 0:
                steps = 2.0 * (ranks - 1)
                yield Measured("node", (steps, steps * size / ranks), seconds)
    finally:
        dist.destroy_process_group()


def _samples(values: torch.Tensor, device: torch.device, budget_s: float) -> tuple[float, ...]:
    """Seconds per all-reduce. All ranks take as many samples: rank 0 says when there is no time for more."""
    _elapsed(values, 2, device)
    samples: list[float] = []
    begin, going = time.perf_counter(), torch.ones(1, device=device)
    while len(samples) < 2 or (len(samples) < SAMPLES and float(going) > 0):
        samples.append(_elapsed(values, REPEATS, device))
        going.fill_(time.perf_counter() - begin < budget_s)
        dist.broadcast(going, 0)
    return tuple(samples)


def _elapsed(values: torch.Tensor, repeats: int, device: torch.device) -> float:
    dist.barrier()
    start = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(values)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / repeats
