"""The simplest GPU kernel for FutureKL, to compare with: one program per sequence steps through it from its end with a carry."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _serial_scan_kernel(x, out, length, gamma):
    """x, out: float32 [B, L]. The next value is fetched before the current one is used, so that its latency overlaps."""
    base = tl.program_id(0).to(tl.int64) * length
    decay = tl.load(gamma)
    carry = tl.load(gamma) * 0.0
    value = tl.load(x + base + length - 1)
    t = length - 1
    while t >= 0:
        following = tl.load(x + base + tl.maximum(t - 1, 0))
        carry = value + decay * carry
        tl.store(out + base + t, carry)
        value = following
        t -= 1


def serial_scan(x: Tensor, gamma: Tensor) -> Tensor:
    """F_t = x_t + γ·F_{t+1} along the last axis: float32 [B, L] → [B, L]. gamma: float32 [1]."""
    out = torch.empty_like(x)
    _serial_scan_kernel[(x.shape[0],)](x, out, x.shape[1], gamma, num_warps=1)
    return out
