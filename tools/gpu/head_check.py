"""The log-prob head on the device, by Triton's kernels and by torch, against a full log-softmax in float64."""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gpu.compare import Errors, largest_difference, one_row, poison, relative_norm, require, within
from gpu.measure import Bench
from gpu.report import Row
from megatron_fipo.config import HeadConfig
from megatron_fipo.model.logprob_head.head import HeadRequest, response_log_probs

SECTION = "head"
KERNELS = ("triton", "torch")
TEMPERATURE = 0.9
EXACT = {"log-prob": 1e-5, "entropy": 1e-4, "dH": 1e-4, "dW": 1e-4}
"""For float32: largest difference relative to the largest value (at least 1); relative norm of the gradients."""
ROUNDED = {"log-prob": 1e-4, "entropy": 1e-3, "dH": 1e-2, "dW": 1e-2}
"""For bfloat16, whose products are summed in float32: values are exact but for that, gradients are rounded once or twice."""
KEPT = ROUNDED | {"dH": 3e-2, "dW": 3e-2}
"""The gradient sees the rounding of logits that were kept in bfloat16."""
REPEATS = 20


@dataclass(frozen=True)
class HeadInputs:
    hidden: Tensor
    """[T, 1, H], with gradient."""
    weight: Tensor
    """[V, H], with gradient and, in bfloat16, a `main_grad` that already holds something."""
    request: HeadRequest
    grad_log_probs: Tensor
    """[R]."""
    grad_entropy: Tensor
    """[R]; zeros without an entropy bonus."""

    def run(self) -> tuple[Tensor, Tensor]:
        return response_log_probs(self.hidden, self.weight, self.request, None, False)


def random_head_inputs(
    bench: Bench, settings: HeadConfig, dtype: torch.dtype, bonus: bool, seed: int = 0
) -> HeadInputs:
    """T tokens of which two thirds are response rows; a vocabulary whose end is padding; some rows without gradient."""
    tokens, hidden_size, vocabulary, columns = bench.pick((3_000, 512, 4_100, 4_224), (60, 32, 100, 128))
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(bench.device)

    hidden = normal(tokens, 1, hidden_size).to(dtype).requires_grad_()
    weight = normal(columns, hidden_size, scale=2 / hidden_size**0.5).to(dtype).requires_grad_()
    if dtype == torch.bfloat16:
        weight.main_grad = normal(columns, hidden_size)  # type: ignore[attr-defined]
    rows = torch.randperm(tokens, generator=generator)[: 2 * tokens // 3].sort().values.to(bench.device)
    labels = torch.randint(vocabulary, (len(rows),), generator=generator).to(bench.device)
    active = torch.arange(len(rows), device=bench.device) % 5 != 0
    request = HeadRequest(rows, labels, vocabulary, TEMPERATURE, settings, bonus)
    return HeadInputs(hidden, weight, request, normal(len(rows)) * active, normal(len(rows)) * active * bonus)


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


def run_head(inputs: HeadInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same from the head under test; the weight's gradient from `main_grad` where there is one, which is put back."""
    log_probs, entropy = inputs.run()
    total = (log_probs * inputs.grad_log_probs).sum()
    if inputs.request.entropy_gradient:
        total = total + (entropy * inputs.grad_entropy).sum()
    held = getattr(inputs.weight, "main_grad", None)
    before = None if held is None else held.clone()
    grad_hidden, grad_weight = torch.autograd.grad(
        total, [inputs.hidden, inputs.weight]
    )  # the latter a stand-in beside main_grad
    if held is not None and before is not None:
        require(bool(inputs.weight.grad_added_to_main_grad), "grad_added_to_main_grad is not set")  # type: ignore[attr-defined]
        grad_weight = held - before
        held.copy_(before)
    return log_probs.detach(), entropy.detach(), grad_hidden, grad_weight


def check_head(
    bench: Bench, settings: HeadConfig, dtype: torch.dtype, bonus: bool, tolerances: Errors
) -> Errors:
    inputs = random_head_inputs(bench, settings, dtype, bonus)
    truth = reference(inputs)
    rows, elements = len(inputs.request.labels), inputs.weight.numel()
    poison(bench, {torch.float32: [rows, elements]})
    poison(bench, {dtype: [inputs.hidden.numel(), elements]})
    found = run_head(inputs)
    errors = {
        "log-prob": largest_difference(found[0], truth[0]),
        "entropy": largest_difference(found[1], truth[1]),
        "dH": relative_norm(found[2], truth[2]),
        "dW": relative_norm(found[3], truth[3]),
    }
    return within(errors, tolerances)


def every_setting(bench: Bench) -> Iterator[Row]:
    """Recomputed and kept logits, one workspace and many, with and without an entropy bonus, both dtypes."""
    bf16, fp32 = torch.bfloat16, torch.float32
    for kernels in KERNELS:
        default, small = HeadConfig(kernels=kernels), HeadConfig(kernels=kernels, workspace_mb=1)
        kept, part = (
            HeadConfig(kernels=kernels, logits_memory_mb=megabytes) for megabytes in (4096, bench.pick(8, 1))
        )
        checks: dict[str, Callable[[], Errors]] = {
            "bf16": partial(check_head, bench, default, bf16, False, ROUNDED),
            "bf16, bonus": partial(check_head, bench, default, bf16, True, ROUNDED),
            "bf16, workspace 1 MB": partial(check_head, bench, small, bf16, True, ROUNDED),
            "bf16, all logits kept": partial(check_head, bench, kept, bf16, True, KEPT),
            "bf16, some logits kept": partial(check_head, bench, part, bf16, False, KEPT),
            "fp32": partial(check_head, bench, default, fp32, True, EXACT),
        }
        yield one_row(SECTION, f"settings, {kernels}", checks)


def same_bits(bench: Bench) -> Iterator[Row]:
    """A race shows as bits that move from launch to launch."""
    repeats = bench.pick(REPEATS, 3)

    def check(settings: HeadConfig) -> Errors:
        inputs = random_head_inputs(bench, settings, torch.bfloat16, True)
        first = run_head(inputs)
        for repeat in range(1, repeats):
            poison(bench, {torch.float32: [len(inputs.request.labels), inputs.weight.numel()]})
            again = run_head(inputs)
            moved = [
                n
                for n, a, b in zip(("log-prob", "entropy", "dH", "dW"), first, again, strict=True)
                if not torch.equal(a, b)
            ]
            require(not moved, f"{', '.join(moved)} differ between launch 1 and launch {repeat + 1}")
        return {f"moving bits in {repeats} launches": 0.0}

    for kernels in KERNELS:
        yield one_row(
            SECTION, f"same bits, {kernels}", {"launches": partial(check, HeadConfig(kernels=kernels))}
        )


CASES: dict[str, Callable[[Bench], Iterator[Row]]] = {"settings": every_setting, "same bits": same_bits}
