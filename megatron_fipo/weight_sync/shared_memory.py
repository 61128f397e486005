"""A bucket of tensors in memory that other processes of this machine map: one copy in, none out, nothing pickled."""

import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes; each tensor begins at a multiple."""


@contextmanager
def in_shared_memory(bucket: Mapping[str, Tensor]) -> Iterator[dict[str, Any]]:
    """Copy the tensors, once, to memory that other processes of this user can map; gives the arguments of `read_bucket`.

    The memory has no name in any file system (so /dev/shm may be small, as it is in containers) and ends with the `with` block
    or this process, however it ends.
    """
    ends, size = [], 0
    for tensor in bucket.values():
        ends.append(size := -(-size // ALIGNMENT) * ALIGNMENT + tensor.nbytes)
    descriptor = os.memfd_create("megatron-fipo-weights")
    try:
        os.ftruncate(descriptor, max(size, 1))
        memory = torch.frombuffer(mmap.mmap(descriptor, max(size, 1)), dtype=torch.uint8)
        for end, tensor in zip(ends, bucket.values(), strict=True):
            memory[end - tensor.nbytes : end].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        yield {**description(bucket), "path": f"/proc/{os.getpid()}/fd/{descriptor}"}
    finally:
        os.close(descriptor)


def description(bucket: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of vLLM's update info: names, dtype names, shapes."""
    return {
        "names": list(bucket),
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in bucket.values()],
        "shapes": [list(tensor.shape) for tensor in bucket.values()],
    }


def read_bucket(
    path: str, names: Sequence[str], dtype_names: Sequence[str], shapes: Sequence[Sequence[int]]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that `in_shared_memory` wrote, as views of the mapping, which lives as any of them."""
    with open(path, "rb") as file:
        memory = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
    start = 0
    for name, dtype_name, shape in zip(names, dtype_names, shapes, strict=True):
        dtype = getattr(torch, dtype_name)
        start = -(-start // ALIGNMENT) * ALIGNMENT
        end = start + torch.Size(shape).numel() * dtype.itemsize
        yield name, memory[start:end].view(dtype).view(shape)
        start = end
