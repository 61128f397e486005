"""What an iteration needed on this rank."""

import resource
import sys
from collections.abc import Mapping

import torch

from megatron_fipo.trainer.protocol import RankCosts

MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024
"""The unit of `ru_maxrss`."""


def take_costs(seconds: Mapping[str, float], device: torch.device, logits_mb: int | None = None) -> RankCosts:
    """Seconds of `unpickle` and `shards`, and the peak memory of `device` since the last call or the start.

    `logits_mb`: the head's budget, if this rank has a head.
    """
    gpu = device.type == "cuda"
    costs = RankCosts(
        unpickle_s=seconds["unpickle"],
        shards_s=seconds["shards"],
        host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_BYTES,
        device_bytes=torch.cuda.max_memory_allocated(device) if gpu else None,
        reserved_bytes=torch.cuda.max_memory_reserved(device) if gpu else None,
        logits_bytes=logits_mb * 2**20 if gpu and logits_mb is not None else None,
    )
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    return costs
