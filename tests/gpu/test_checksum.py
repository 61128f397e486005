"""Checksums of weights on the device, against those on the CPU."""

import pytest
import torch

from megatron_fipo.weight_sync.checksum import Checksums, tensor_checksum
from tests.gpu.compare import require
from tools.bench.harness import Bench

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.int8, torch.int64)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_the_device_computes_the_checksums_of_the_cpu(bench: Bench, dtype: torch.dtype):
    """Several blocks and an incomplete row; not contiguous, not aligned, empty and without dimensions; two streams."""
    height = bench.pick(9001, 31)
    bits = torch.randint(-128, 128, (height, 4100 * dtype.itemsize), dtype=torch.int8)
    matrix = bits.view(dtype)
    tensors = {
        "matrix": matrix,
        "transposed": matrix[:500].t(),
        "columns": matrix[:, 1:4001],
        "tail": matrix.view(-1)[1:],
        "vector": matrix[0, :7],
        "scalar": matrix[0, 0],
        "empty": matrix[:0],
    }
    expected = {name: tensor_checksum(name, tensor) for name, tensor in tensors.items()}
    checksums = Checksums()
    on_device = matrix.to(bench.device)
    views = {
        name: on_device.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        for name, tensor in tensors.items()
    }
    streams = [torch.cuda.Stream() for _ in range(2)] if bench.on_gpu else []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for index, (name, tensor) in enumerate(views.items()):
        with torch.cuda.stream(streams[index % 2] if streams else None):
            checksums.add(name, tensor)
    require(checksums.finish() == expected, "the device computes other checksums than the CPU")
