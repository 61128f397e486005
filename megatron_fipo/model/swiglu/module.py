"""The activation of a dense feed-forward layer.

Megatron-Core fuses it through torch.compile, which compiles again for packs of other lengths and passes without gradient.
The Triton kernels here compile once: the number of tokens is in their grid alone.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from megatron_fipo.objective.kernels.choice import takes_triton

DTYPES = (torch.bfloat16, torch.float32)


class SwiGLU(torch.nn.Module):
    """SiLU(gate) · up: [..., 2·F], gate before up, -> [..., F] of the same dtype.

    Keeps its input for backward and nothing else. `kernels`: `auto` (Triton on a GPU, else plain torch), `triton` or `torch`.
    """

    def __init__(self, kernels: str = "auto") -> None:
        super().__init__()
        self.kernels = kernels

    def forward(self, gate_and_up: torch.Tensor) -> torch.Tensor:
        return _SwiGLU.apply(gate_and_up, takes_triton(self.kernels, gate_and_up, DTYPES))

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Empty. Megatron-Core 0.16 asks every part of a feed-forward layer for its part of a checkpoint."""
        return {}


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: torch.Tensor, use_triton: bool) -> torch.Tensor:
        ctx.save_for_backward(gate_and_up)
        ctx.use_triton = use_triton
        if use_triton:
            from megatron_fipo.model.swiglu import triton_kernels  # imports Triton, an optional dependency

            return triton_kernels.forward(gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gate_and_up,) = ctx.saved_tensors
        if ctx.use_triton:
            from megatron_fipo.model.swiglu import triton_kernels

            return triton_kernels.backward(grad, gate_and_up), None
        gate, up = gate_and_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_and_up)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        torch.mul(grad, F.silu(gate), out=grad_up)
        return out, None
