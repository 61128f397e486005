"""SwiGLU as Triton kernels: one program per token and block of columns, computed in float32, rounded once."""

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _load(gate_and_up, token, column, exists, width):
    """(gate, up) in float32."""
    gate = gate_and_up + token * 2 * width + column
    return (
        tl.load(gate, mask=exists, other=0.0).to(tl.float32),
        tl.load(gate + width, mask=exists, other=0.0).to(tl.float32),
    )


@triton.jit
def swiglu_kernel(gate_and_up, out, width, BLOCK: tl.constexpr):
    """[T, 2·width] -> out [T, width]."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = column < width
    gate, up = _load(gate_and_up, token, column, exists, width)
    result = gate * tl.sigmoid(gate) * up
    tl.store(out + token * width + column, result.to(out.dtype.element_ty), mask=exists)


@triton.jit
def swiglu_gradient_kernel(grad, gate_and_up, out, width, BLOCK: tl.constexpr):
    """grad [T, width], [T, 2·width] -> out [T, 2·width], the gradients of gate and up."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = column < width
    gate, up = _load(gate_and_up, token, column, exists, width)
    incoming = tl.load(grad + token * width + column, mask=exists, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dtype: tl.constexpr = out.dtype.element_ty
    target = out + token * 2 * width + column
    grad_gate = incoming * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(target, grad_gate.to(dtype), mask=exists)
    tl.store(target + width, (incoming * gate * sigmoid).to(dtype), mask=exists)


def forward(gate_and_up: torch.Tensor) -> torch.Tensor:
    """[..., 2·F] -> [..., F]."""
    gate_and_up = gate_and_up.contiguous()
    *shape, columns = gate_and_up.shape
    out = gate_and_up.new_empty(*shape, columns // 2)
    _launch(swiglu_kernel, gate_and_up, out, width=columns // 2)
    return out


def backward(grad: torch.Tensor, gate_and_up: torch.Tensor) -> torch.Tensor:
    """grad [..., F], [..., 2·F] -> [..., 2·F]."""
    gate_and_up = gate_and_up.contiguous()
    out = torch.empty_like(gate_and_up)
    _launch(swiglu_gradient_kernel, grad.contiguous(), gate_and_up, out, width=grad.shape[-1])
    return out


def _launch(kernel, *tensors: torch.Tensor, width: int) -> None:
    tokens = tensors[-1].numel() // tensors[-1].shape[-1]
    if tokens:
        kernel[(tokens, triton.cdiv(width, BLOCK))](*tensors, width, BLOCK=BLOCK, num_warps=4)
