"""SwiGLU by Triton and by plain torch against float64."""

import pytest
import torch
import torch.nn.functional as F

from megatron_fipo.model.swiglu import SwiGLU

SHAPES = [(5, 1, 3000), (1, 2), (7, 2048), (0, 1, 64)]
"""Of the input: one block and several, odd widths, no tokens."""


def _run(kernels: str, given: torch.Tensor, incoming: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = given.clone().requires_grad_()
    out = SwiGLU(kernels)(leaf)
    out.backward(incoming)
    assert leaf.grad is not None
    return out.detach(), leaf.grad


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernels", ["triton", "torch"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_value_and_gradient_are_the_definition(kernels, dtype, tolerance, shape):
    generator = torch.Generator().manual_seed(0)
    given = (4 * torch.randn(shape, generator=generator)).to(dtype)
    incoming = torch.randn(*shape[:-1], shape[-1] // 2, generator=generator).to(dtype)
    leaf = given.double().requires_grad_()
    gate, up = leaf.chunk(2, dim=-1)
    expected = F.silu(gate) * up
    expected.backward(incoming.double())
    value, gradient = _run(kernels, given, incoming)
    assert value.dtype == gradient.dtype == dtype
    torch.testing.assert_close(value.double(), expected.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient.double(), leaf.grad, rtol=tolerance, atol=tolerance)


def test_plain_torch_has_the_bits_of_autograd():
    given, incoming = torch.randn(9, 1, 88), torch.randn(9, 1, 44)
    leaf = given.clone().requires_grad_()
    gate, up = leaf.chunk(2, dim=-1)
    (F.silu(gate) * up).backward(incoming)
    value, gradient = _run("torch", given, incoming)
    assert torch.equal(value, F.silu(gate) * up)
    assert torch.equal(gradient, leaf.grad)


def test_a_view_may_lie_in_memory_as_it_likes():
    given, incoming = torch.randn(64, 2, 6).permute(2, 1, 0), torch.randn(32, 2, 6).permute(2, 1, 0)
    for found, expected in zip(_run("triton", given, incoming), _run("torch", given, incoming), strict=True):
        torch.testing.assert_close(found, expected)


def test_only_the_input_is_kept_for_backward():
    kept: list[torch.Tensor] = []
    given = torch.randn(3, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        SwiGLU("torch")(given)
    assert [tensor.data_ptr() for tensor in kept] == [given.data_ptr()]


def test_another_dtype_is_refused_by_triton_and_computed_by_torch():
    with pytest.raises(ValueError, match="float64"):
        SwiGLU("triton")(torch.ones(2, 4, dtype=torch.float64))
    assert SwiGLU("auto")(torch.ones(2, 4, dtype=torch.float64)).dtype == torch.float64
