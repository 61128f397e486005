"""Random inputs of the log-prob head, and its values and gradients for them."""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fipo.config import HeadConfig
from megatron_fipo.model.logprob_head.head import HeadRequest, response_log_probs
from tests.gpu.compare import require
from tools.bench.harness import Bench

TEMPERATURE = 0.9


@dataclass(frozen=True)
class HeadInputs:
    hidden: Tensor
    """[T, 1, H], with gradient."""
    weight: Tensor
    """[V, H], with gradient and, in bfloat16, a `main_grad` that is not zero."""
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


def run_head(inputs: HeadInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, entropy, dH and dW; dW from `main_grad` if there is one, which is then restored."""
    log_probs, entropy = inputs.run()
    total = (log_probs * inputs.grad_log_probs).sum()
    if inputs.request.entropy_gradient:
        total = total + (entropy * inputs.grad_entropy).sum()
    main_grad = getattr(inputs.weight, "main_grad", None)
    before = None if main_grad is None else main_grad.clone()
    # With main_grad the weight's own gradient is a placeholder.
    grad_hidden, grad_weight = torch.autograd.grad(total, [inputs.hidden, inputs.weight])
    if main_grad is not None and before is not None:
        require(bool(inputs.weight.grad_added_to_main_grad), "grad_added_to_main_grad is not set")  # type: ignore[attr-defined]
        grad_weight = main_grad - before
        main_grad.copy_(before)
    return log_probs.detach(), entropy.detach(), grad_hidden, grad_weight
