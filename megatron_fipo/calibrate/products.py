"""Matrix products at the model's shapes, and narrow ones as a decoding step has them."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from megatron_fipo.calibrate.messages import Measured, Message, Skipped
from megatron_fipo.calibrate.shapes import (
    MOST_ON_CPU,
    Weight,
    head_weight,
    layer_weights,
    measured_weights,
    micro_batch_tokens,
)
from megatron_fipo.calibrate.timing import timed
from megatron_fipo.environment import find_accelerators
from megatron_fipo.errors import one_line
from megatron_fipo.plan.case import Case
from megatron_fipo.plan.machine import PRECISIONS

NARROW_LAYERS = 4
"""Layers whose weights narrow products read in turn, so that a cache does not hold them."""
FP8_CAPABILITY = (8, 9)
BLOCKWISE_CAPABILITY = (9, 0)


def measure(case: Case, device: torch.device, budget_s: float) -> Iterator[Message]:
    """`products.PRECISION` with the features (operations, short side), `decode_weights` with (bytes,)."""
    weights = measured_weights(case)
    precisions = [case.config.model.dtype]
    if device.type == "cuda":
        precisions += [name for name in PRECISIONS if name.startswith("fp8") or name == "bfloat16"]
    precisions = list(dict.fromkeys(precisions))
    each = budget_s / (2 * len(weights) * len(precisions) + 1)
    yield narrow_products(case, device, each)
    for precision in precisions:
        if reason := obstacle(precision):
            yield Skipped(f"products.{precision}", reason)
            continue
        try:
            for weight in weights:
                yield from measure_weight(weight, micro_batch_tokens(case.config), precision, device, each)
        except (
            Exception
        ) as error:  # a recipe that the installed libraries refuse for this GPU or these shapes
            yield Skipped(f"products.{precision}", one_line(error)[:200])


def measure_weight(
    weight: Weight, tokens: int, precision: str, device: torch.device, budget_s: float
) -> Iterator[Message]:
    """A linear layer forward, and forward with backward."""
    if device.type == "cpu":
        tokens = weight.tokens_within(tokens, MOST_ON_CPU)
    if precision.startswith("fp8"):
        tokens = max(128, tokens // 128 * 128)
    layer, context = linear(weight, precision, device)
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    x = torch.randn(tokens, weight.inputs, dtype=dtype, device=device, requires_grad=True)
    gradient = torch.randn(tokens, weight.outputs, dtype=dtype, device=device)

    def forward() -> Tensor:
        with context():
            return layer(x)

    def both() -> None:
        x.grad = layer.weight.grad = None
        forward().backward(gradient)

    def seconds(call: Callable[[], object], passes: int) -> Measured:
        features = passes * weight.operations(tokens), float(weight.side)
        return Measured(f"products.{precision}", features, timed(call, device, budget_s))

    yield seconds(forward, 1)
    yield seconds(both, 3)


def linear(weight: Weight, precision: str, device: torch.device) -> tuple[Any, Callable[[], Any]]:
    """A linear layer, and the context in which it multiplies in this precision. FP8 is Transformer Engine's."""
    if not precision.startswith("fp8"):
        dtype = getattr(torch, precision)
        layer = torch.nn.Linear(weight.inputs, weight.outputs, bias=False, device=device, dtype=dtype)
        return layer, nullcontext
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8BlockScaling, Float8CurrentScaling

    recipe = Float8BlockScaling() if precision == "fp8_blockwise" else Float8CurrentScaling()
    layer = te.Linear(weight.inputs, weight.outputs, bias=False, params_dtype=torch.bfloat16, device=device)
    return layer, lambda: te.fp8_autocast(enabled=True, fp8_recipe=recipe)


def obstacle(precision: str) -> str | None:
    """Why this machine has no products in this precision."""
    if not precision.startswith("fp8"):
        return None
    found = find_accelerators()
    if found.transformer_engine is None:
        return "Transformer Engine is not installed"
    needed = BLOCKWISE_CAPABILITY if precision == "fp8_blockwise" else FP8_CAPABILITY
    if found.capability is None or found.capability < needed:
        return f"the GPU's compute capability is below {needed[0]}.{needed[1]}"
    return None


def narrow_products(case: Case, device: torch.device, budget_s: float) -> Measured:
    """One row times each weight of some layers and of the head."""
    dtype = getattr(torch, case.config.model.dtype)
    layers = min(NARROW_LAYERS, case.architecture.num_layers)
    shapes = [*layer_weights(case) * layers, head_weight(case)]
    weights = [torch.randn(shape.outputs, shape.inputs, dtype=dtype, device=device) for shape in shapes]
    rows = [torch.randn(1, shape.inputs, dtype=dtype, device=device) for shape in shapes]

    def read() -> None:
        for row, weight in zip(rows, weights, strict=True):
            torch.nn.functional.linear(row, weight)

    size = sum(weight.nbytes for weight in weights)
    return Measured("decode_weights", (float(size),), timed(read, device, budget_s))
