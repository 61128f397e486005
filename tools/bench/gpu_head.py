"""Speed and memory of the head, forward and backward in bfloat16: against its bare products, plain code, and two libraries.

python -m tools.bench.gpu_head
"""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fipo.config import HeadConfig
from megatron_fipo.model.logprob_head.head import HeadRequest, response_log_probs
from tests.gpu.compare import relative_norm, require
from tools.bench.harness import Bench, Cases, Timing, guarded, peak_extra, release, run_cases, time_calls
from tools.bench.report import FIGURE, Row, aimed, duration, mebibytes

SECTION = "head-speed"
SHAPES = {
    "8,192 x 4,096 x 151,936": (8_192, 4_096, 151_936),
    "20,480 x 5,120 x 19,008": (20_480, 5_120, 19_008),
}
"""Tokens, hidden size, vocabulary: a complete output layer, and an eighth of the 32B model's."""
TOY = {"8,192 x 4,096 x 151,936": (24, 16, 384), "20,480 x 5,120 x 19,008": (32, 16, 130)}
TIME_AIM, MEMORY_AIM = 1.35, 2**30
"""Most time relative to the three bare products, and most bytes beside inputs and main_grad."""
HEADS = {
    "default": {},
    "900 MB of logits kept": {"logits_memory_mb": 900},
    "workspace 128 MB": {"workspace_mb": 128},
    "workspace 2,048 MB": {"workspace_mb": 2048},
    "default, torch": {"kernels": "torch"},
}
AGREE = 1e-2
"""Largest relative norm of dH and dW, in bfloat16, against products and softmax in float32."""
REFERENCE_ROWS = 1_024
"""Tokens whose float32 logits exist at one time in the reference."""


@dataclass(frozen=True)
class Problem:
    hidden: Tensor
    """[T, H] bfloat16 with gradient."""
    weight: Tensor
    """[V, H] bfloat16 with gradient and `main_grad`."""
    labels: Tensor


def make_problem(bench: Bench, tokens: int, hidden_size: int, vocabulary: int) -> Problem:
    generator = torch.Generator(device=bench.device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (
            torch.randn(*shape, generator=generator, device=bench.device, dtype=torch.bfloat16)
            .mul_(scale)
            .requires_grad_()
        )

    weight = normal(vocabulary, hidden_size, scale=2 / hidden_size**0.5)
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
    labels = torch.randint(vocabulary, (tokens,), generator=generator, device=bench.device)
    return Problem(normal(tokens, hidden_size), weight, labels)


def bare_products(problem: Problem) -> Callable[[], object]:
    """Logits, gradient of the hidden states, gradient of the weight: bfloat16 products into allocated memory."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    logits = torch.randn(len(hidden), len(weight), dtype=torch.bfloat16, device=hidden.device).mul_(1e-3)
    grad_hidden, grad_weight, out = map(torch.empty_like, (hidden, weight, logits))

    def call() -> None:
        torch.mm(hidden, weight.t(), out=out)
        torch.mm(logits, weight, out=grad_hidden)
        torch.mm(logits.t(), hidden, out=grad_weight)

    return call


def head(problem: Problem, settings: HeadConfig) -> Callable[[], tuple[Tensor, Tensor]]:
    rows = torch.arange(len(problem.labels), device=problem.labels.device)
    request = HeadRequest(rows, problem.labels, len(problem.weight), 1.0, settings, False)

    def call() -> tuple[Tensor, Tensor]:
        log_probs, _ = response_log_probs(problem.hidden.unsqueeze(1), problem.weight, request, None, False)
        return torch.autograd.grad(-log_probs.sum(), [problem.hidden, problem.weight])

    return call


def plain(problem: Problem) -> tuple[Tensor, Tensor]:
    """Logits of all tokens in bfloat16, cross-entropy in float32."""
    logits = problem.hidden @ problem.weight.t()
    return torch.autograd.grad(
        F.cross_entropy(logits.float(), problem.labels, reduction="sum"), [problem.hidden, problem.weight]
    )


def liger(problem: Problem) -> Callable[[], tuple[Tensor, Tensor]]:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    criterion = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    inputs = [problem.hidden, problem.weight]
    return lambda: torch.autograd.grad(criterion(problem.weight, problem.hidden, problem.labels), inputs)


def cut(problem: Problem) -> Callable[[], tuple[Tensor, Tensor]]:
    from cut_cross_entropy import linear_cross_entropy

    inputs = [problem.hidden, problem.weight]
    return lambda: torch.autograd.grad(linear_cross_entropy(*inputs, problem.labels, reduction="sum"), inputs)


@torch.no_grad()
def reference(problem: Problem) -> tuple[Tensor, Tensor]:
    """dH and dW in float32, a few tokens at a time."""
    weight = problem.weight.float()
    grad_hidden, grad_weight = torch.empty_like(problem.hidden, dtype=torch.float32), torch.zeros_like(weight)
    for start in range(0, len(problem.labels), REFERENCE_ROWS):
        rows = slice(start, start + REFERENCE_ROWS)
        hidden, labels = problem.hidden[rows].float(), problem.labels[rows, None]
        slope = (hidden @ weight.t()).softmax(dim=-1)
        slope.scatter_add_(1, labels, torch.full_like(labels, -1.0, dtype=torch.float32))
        grad_hidden[rows] = slope @ weight
        grad_weight.addmm_(slope.t(), hidden)
    return grad_hidden, grad_weight


def compare(bench: Bench, shape: str, tokens: int, hidden_size: int, vocabulary: int) -> Iterator[Row]:
    problem = make_problem(bench, tokens, hidden_size, vocabulary)
    products = bare_products(problem)
    bare = time_calls(bench, products, repeat=15)
    del products
    release(bench)
    flops = 6 * tokens * hidden_size * vocabulary
    result = f"{duration(bare.median)}, {flops / bare.median / 1e12:,.0f} TFLOP/s"
    yield Row(SECTION, f"bare products, {shape}", FIGURE, result, bare.figures("products"))
    truth = reference(problem)
    for name, settings in HEADS.items():
        config = HeadConfig(**settings)
        found = main_gradients(problem, config)
        for part, value, expected in zip(("dH", "dW"), found, truth, strict=True):
            error = relative_norm(value, expected)
            require(error < AGREE, f"{name}: {part} is off by {error:.2g}")
        del found, value, expected
        yield head_row(bench, f"head {name}, {shape}", head(problem, config), bare, aim=name == "default")
    contenders: dict[str, Callable[[], Callable[[], tuple[Tensor, Tensor]]]] = {
        "plain logits": lambda: lambda: plain(problem),
        "Liger": lambda: liger(problem),
        "cut cross-entropy": lambda: cut(problem),
    }
    for name, make in contenders.items():
        yield from rival(bench, f"{name}, {shape}", make, bare, truth)


def main_gradients(problem: Problem, settings: HeadConfig) -> tuple[Tensor, Tensor]:
    """dH and, from a cleared `main_grad`, dW."""
    main_grad = problem.weight.main_grad  # type: ignore[attr-defined]
    main_grad.zero_()
    grad_hidden = head(problem, settings)()[0]
    grad_weight = main_grad.bfloat16()
    main_grad.zero_()
    return grad_hidden, grad_weight


def head_row(
    bench: Bench, name: str, call: Callable[[], object], bare: Timing, aim: bool, uncounted: int = 0
) -> Row:
    """`uncounted`: bytes of the result that do not count as extra."""
    timing, memory = time_calls(bench, call, repeat=15), peak_extra(bench, call) - uncounted
    ratio = timing.median / bare.median
    met = ratio <= TIME_AIM and memory <= MEMORY_AIM
    title = f"{name} (aim <= {TIME_AIM} x, {mebibytes(MEMORY_AIM)})" if aim else name
    result = f"{ratio:.2f} x the products ({duration(timing.median)}), {mebibytes(memory)} extra"
    figures = {"ratio": ratio, "extra_bytes": memory} | timing.figures("head")
    return Row(SECTION, title, aimed(met) if aim else FIGURE, result, figures)


def rival(
    bench: Bench, name: str, make: Callable, bare: Timing, truth: tuple[Tensor, Tensor]
) -> Iterator[Row]:
    """Time and memory of another implementation; a missing package, too little memory or an error costs one row."""

    def measure() -> Iterator[Row]:
        call = make()
        error = max(relative_norm(value, expected) for value, expected in zip(call(), truth, strict=True))
        # Theirs return the weight's gradient; ours is in main_grad, which was allocated before.
        returned = truth[1].numel() * 2 if bench.on_gpu else 0
        row = head_row(bench, name, call, bare, aim=False, uncounted=returned)
        result, figures = f"{row.result}; gradients off by {error:.0e}", row.figures | {"difference": error}
        yield replace(row, result=result, figures=figures)

    yield from guarded(SECTION, name, measure)
    release(bench)


def _case(shape: str) -> Callable[[Bench], Iterator[Row]]:
    return lambda bench: compare(bench, shape, *bench.pick(SHAPES, TOY)[shape])


CASES: Cases = {shape: _case(shape) for shape in SHAPES}

if __name__ == "__main__":
    run_cases(__doc__, SECTION, CASES)
