"""How much memory the head may use to keep logits, where `head.logits_memory_mb` leaves that to the run."""

from dataclasses import dataclass

import torch

SHARE = 0.5
"""Of the memory that a step has left free. The rest is for packs that need more than those of the first steps."""
DECIDED_AFTER = 2
"""Optimizer steps: the first one creates the optimizer's state, so only the second shows what a step needs."""


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on a GPU after a step."""

    free: int
    """Not used by any process."""
    reserved: int
    """Held by this process's allocator."""
    peak: int
    """The most that was allocated from it so far."""


def logits_budget_mb(memory: DeviceMemory) -> int:
    """`head.logits_memory_mb` for the steps to come: half of what the peak of the steps so far left free.

    Example: of 80 GiB another process has 4, the allocator holds 60 with a peak of 56: 16 + 60 − 56 = 20 GiB are left free,
    and 10 GiB may keep logits.
    """
    left = memory.free + memory.reserved - memory.peak
    return max(0, int(SHARE * left)) // 2**20


def device_memory(device: torch.device) -> DeviceMemory | None:
    """None on a CPU, where logits are recomputed, and in deterministic runs: a budget that is measured may differ between two
    runs, and with it the rounding of gradients."""
    if device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return DeviceMemory(free, torch.cuda.memory_reserved(device), torch.cuda.max_memory_allocated(device))
