"""The costs that a rank reports."""

import numpy as np
import psutil
import torch

from megatron_fipo.environment import BF16_PEAK_FLOPS
from megatron_fipo.trainer.costs import take_costs

CPU = torch.device("cpu")


def test_host_memory_is_the_peak_of_the_process_in_bytes() -> None:
    before = take_costs({"unpickle": 1.5, "shards": 2.5}, CPU)
    assert (before.unpickle_s, before.shards_s) == (1.5, 2.5)
    rss = psutil.Process().memory_info().rss
    block = np.ones(before.host_bytes - rss + 64 * 2**20, dtype=np.uint8)
    during = take_costs({"unpickle": 0.0, "shards": 0.0}, CPU)
    assert during.host_bytes > before.host_bytes + 32 * 2**20
    assert during.host_bytes < before.host_bytes + 2 * len(block)
    del block
    assert take_costs({"unpickle": 0.0, "shards": 0.0}, CPU).host_bytes >= during.host_bytes
    assert (during.device_bytes, during.reserved_bytes) == (None, None)


def test_a_part_of_a_gpu_has_no_peak() -> None:
    assert BF16_PEAK_FLOPS["NVIDIA H200"] == 989e12
    assert "NVIDIA H200 MIG 1g.18gb" not in BF16_PEAK_FLOPS
    assert all(name.startswith("NVIDIA ") for name in BF16_PEAK_FLOPS)
