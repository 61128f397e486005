"""The log-prob head on the device, by Triton's kernels and by torch, against a full log-softmax in float64."""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_fipo.config import HeadConfig
from tests.gpu.compare import Errors, largest_difference, poison, relative_norm, require
from tests.gpu.head_inputs import HeadInputs, random_head_inputs, run_head
from tools.bench.harness import Bench

pytestmark = pytest.mark.gpu
both_kernels = pytest.mark.parametrize("kernels", ["triton", "torch"])
EXACT = {"log-prob": 1e-5, "entropy": 1e-4, "dH": 1e-4, "dW": 1e-4}
"""For float32: largest difference relative to the largest value (at least 1); relative norm of the gradients."""
ROUNDED = {"log-prob": 1e-4, "entropy": 1e-3, "dH": 1e-2, "dW": 1e-2}
"""For bfloat16, whose products are summed in float32: values are exact except for that, gradients rounded once or twice."""
KEPT = ROUNDED | {"dH": 3e-2, "dW": 3e-2}
"""The gradient sees the rounding of logits that were kept in bfloat16."""
REPEATS = 20
SETTINGS = {
    "bf16": ({}, torch.bfloat16, False, ROUNDED),
    "bf16, bonus": ({}, torch.bfloat16, True, ROUNDED),
    "bf16, workspace 1 MB": ({"workspace_mb": 1}, torch.bfloat16, True, ROUNDED),
    "bf16, all logits kept": ({"logits_memory_mb": 4096}, torch.bfloat16, True, KEPT),
    "bf16, some logits kept": ({"logits_memory_mb": 8}, torch.bfloat16, False, KEPT),
    "fp32": ({}, torch.float32, True, EXACT),
}
"""Recomputed and kept logits, one workspace and many, with and without an entropy bonus, both dtypes."""


def reference(inputs: HeadInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, entropy, and the gradients of hidden states and weight: everything written out, in float64."""
    hidden, weight = (value.detach().double().requires_grad_() for value in (inputs.hidden, inputs.weight))
    request = inputs.request
    logits = hidden.squeeze(1)[request.row_index] @ weight[: request.vocab_size].t() / request.temperature
    log_probabilities = logits.log_softmax(dim=-1)
    log_probs = log_probabilities.gather(1, request.labels[:, None]).squeeze(1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
    total = (log_probs * inputs.grad_log_probs.double()).sum() + (
        entropy * inputs.grad_entropy.double()
    ).sum()
    return log_probs.detach(), entropy.detach(), *torch.autograd.grad(total, [hidden, weight])


def check_head(bench: Bench, config: HeadConfig, dtype: torch.dtype, bonus: bool) -> Errors:
    inputs = random_head_inputs(bench, config, dtype, bonus)
    truth = reference(inputs)
    rows, elements = len(inputs.request.labels), inputs.weight.numel()
    poison(bench, {torch.float32: [rows, elements]})
    poison(bench, {dtype: [inputs.hidden.numel(), elements]})
    found = run_head(inputs)
    return {
        "log-prob": largest_difference(found[0], truth[0]),
        "entropy": largest_difference(found[1], truth[1]),
        "dH": relative_norm(found[2], truth[2]),
        "dW": relative_norm(found[3], truth[3]),
    }


@pytest.mark.parametrize("settings", SETTINGS)
@both_kernels
def test_every_setting(bench: Bench, record_errors: Callable, kernels: str, settings: str) -> None:
    options, dtype, bonus, tolerances = SETTINGS[settings]
    if settings == "bf16, some logits kept":
        options = {"logits_memory_mb": bench.pick(8, 1)}
    config = HeadConfig(kernels=kernels, **options)
    record_errors(check_head(bench, config, dtype, bonus), tolerances)


@both_kernels
def test_same_bits_at_every_launch(bench: Bench, kernels: str) -> None:
    """A race shows as bits that change from launch to launch."""
    inputs = random_head_inputs(bench, HeadConfig(kernels=kernels), torch.bfloat16, True)
    first = run_head(inputs)
    for repeat in range(1, bench.pick(REPEATS, 3)):
        poison(bench, {torch.float32: [len(inputs.request.labels), inputs.weight.numel()]})
        again = run_head(inputs)
        names = ("log-prob", "entropy", "dH", "dW")
        moved = [n for n, a, b in zip(names, first, again, strict=True) if not torch.equal(a, b)]
        require(not moved, f"{', '.join(moved)} differ between launch 1 and launch {repeat + 1}")
