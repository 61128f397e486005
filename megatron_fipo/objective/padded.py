"""The loss for any trainer that holds complete sequences as [B, L]: the packed loss on a rectangle. Needs torch and nothing else.

    >>> from megatron_fipo import FIPOConfig, fipo_loss
    >>> result = fipo_loss(log_probs, old_log_probs, advantages, response_mask, FIPOConfig(half_life=32.0))
    >>> result.loss.backward()

Every position of the rectangle is a row, masked ones too, so no index depends on the data and the host does not wait.
Index tables are made once per shape [B, L].
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from megatron_fipo.objective.config import ObjectiveConfig
from megatron_fipo.objective.future_kl import scan_future_kl
from megatron_fipo.objective.loss import policy_loss
from megatron_fipo.objective.loss_inputs import PolicyRows
from megatron_fipo.objective.scan_layout import ChunkTable, ScanPlan, build_scan_plan


@dataclass(frozen=True)
class LossResult:
    """What `fipo_loss` returns."""

    loss: Tensor
    """0-d, with gradient."""
    influence_weights: Tensor
    """[B, L], the weight of each token's advantage, without gradient."""
    future_kl: Tensor
    """[B, L], without gradient."""
    loss_mask: Tensor
    """[B, L], 1.0 for tokens in the loss: the response mask without dropped and non-finite responses."""
    statistics: dict[str, Tensor]
    """0-d tensors on the inputs' device; `docs/algorithm.md` lists them."""


def future_kl(log_ratio: Tensor, response_mask: Tensor, half_life: float, kernels: str = "auto") -> Tensor:
    """F_t = Σ_{k≥t} γ^(k−t)·log_ratio_k·mask_k along the last axis, γ = 2^(−1/half_life): [B, L] → [B, L], no gradient.

    The log-ratio is used as given; `fipo_loss` also excludes tokens beyond the dual clip. Distance counts positions,
    masked ones included. Half precision is raised to float32. kernels: `auto` (Triton on a GPU), `triton`, `torch`.
    Raises ValueError for disagreeing shapes and dtypes.
    """
    mask = _checked_mask(response_mask, {"log_ratio": log_ratio})
    values = torch.where(mask, _raised(log_ratio.detach()), 0.0).flatten()
    plan = _rectangle(*mask.shape, mask.device)
    return scan_future_kl(values, values.new_empty(len(values), 0), plan, half_life, kernels=kernels)[0].view(
        mask.shape
    )


def fipo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    config: ObjectiveConfig = ObjectiveConfig(),  # noqa: B008 (frozen)
    kernels: str = "auto",
) -> LossResult:
    """The loss of a batch of complete sequences, averaged over its kept tokens.

    All inputs are [B, L]; `log_probs` carries the gradient; the mask (bool, integer or floating, 0 or 1) marks response
    tokens. float64 in gives float64 out; half precision is raised to float32. The batch counts as one micro-batch: to
    accumulate several with equal weight per token, multiply each loss by its share `loss_mask.sum()` of all kept tokens.
    kernels: `auto` (Triton on a GPU, else plain torch), `triton`, `torch`.
    Raises ValueError for disagreeing shapes and dtypes, and for a config with a KL term, an entropy bonus or a
    correction, whose inputs are not among the arguments.
    """
    given = {"log_probs": log_probs, "old_log_probs": old_log_probs, "advantages": advantages}
    mask = _checked_mask(response_mask, given)
    new, old, weight = (_raised(value) for value in given.values())
    remaining = mask.flip(1).cumsum(1).flip(1)  # response tokens from this position on
    rows = PolicyRows(
        old_log_probs=old.detach().to(new.dtype).flatten(),
        advantages=weight.detach().to(new.dtype).flatten(),
        last_row=(mask & (remaining == 1)).to(new.dtype).flatten(),
        response_length=mask.sum(1).to(new.dtype),
        plan=_rectangle(*mask.shape, mask.device),
        mask=mask.flatten(),
    )
    result = policy_loss(new.flatten(), None, rows, config, kernels=kernels)
    return LossResult(
        loss=result.loss_sum / result.normalizer.clamp(min=1),
        influence_weights=result.influence_weights.view(mask.shape),
        future_kl=result.future_kl.view(mask.shape),
        loss_mask=result.kept.view(mask.shape),
        statistics=result.statistics.tensors(),
    )


@lru_cache(maxsize=8)
def _rectangle(batch: int, length: int, device: torch.device) -> ScanPlan:
    """The plan of B complete sequences of L positions, all of them rows."""
    first = torch.zeros(1, batch, 1, dtype=torch.int64, device="cpu")
    table = ChunkTable(first, torch.full_like(first, length))
    index = torch.arange(batch * length, device="cpu")
    return build_scan_plan(table, 0, index // max(length, 1), index % max(length, 1), device)


def _raised(value: Tensor) -> Tensor:
    """At least float32: half precision would round γ itself."""
    return value if value.dtype == torch.float64 else value.float()


def _checked_mask(mask: Tensor, given: dict[str, Tensor]) -> Tensor:
    """The mask as bool [B, L]. ValueError unless everything has its shape."""
    if mask.ndim != 2 or mask.is_complex():
        raise ValueError(
            f"response_mask must be bool, integer or floating [B, L], not {mask.dtype} {list(mask.shape)}"
        )
    for name, value in given.items():
        if value.shape != mask.shape or not value.is_floating_point():
            expected = f"floating {list(mask.shape)} like response_mask"
            raise ValueError(f"{name} must be {expected}, not {value.dtype} {list(value.shape)}")
    return mask != 0
