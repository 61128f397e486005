"""Tensors through shared memory to another process."""

import json
import os
import subprocess
import sys

import pytest
import torch

from megatron_fipo.weight_sync.checksum import tensor_checksum
from megatron_fipo.weight_sync.shared_memory import in_shared_memory, read_bucket

BUCKET = {
    "odd": torch.randn(3, 5),
    "half": torch.randn(7).bfloat16(),
    "scalar": torch.tensor(2.5),
    "none": torch.empty(0, 4),
    "turned": torch.randn(4, 6).T,
    "bytes": torch.arange(130, dtype=torch.uint8),
}


def test_another_process_reads_what_was_written():
    with in_shared_memory(BUCKET) as info:
        code = (
            "import sys, json, hashlib; from megatron_fipo.weight_sync.shared_memory import read_bucket\n"
            "from megatron_fipo.weight_sync.checksum import tensor_checksum\n"
            "for name, tensor in read_bucket(**json.loads(sys.argv[1])): print(tensor_checksum(name, tensor))"
        )
        output = subprocess.run(
            [sys.executable, "-c", code, json.dumps(info)],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ,
        )
    assert output.stdout.split() == [tensor_checksum(name, tensor) for name, tensor in BUCKET.items()]


def test_what_was_read_outlives_the_file():
    with in_shared_memory(BUCKET) as info:
        read = dict(read_bucket(**info))
    assert not os.path.exists(info["path"])
    assert all(
        torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype
        for name, tensor in BUCKET.items()
    )
    read["odd"].zero_()
    assert BUCKET["odd"].abs().min() > 0


def test_nothing_stays_after_a_failure():
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(RuntimeError, match="worker"), in_shared_memory(BUCKET):
        raise RuntimeError("a worker failed")
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_bucket_without_tensors():
    with in_shared_memory({}) as info:
        assert list(read_bucket(**info)) == []
