"""Log-probabilities of the response tokens, straight from hidden states, without ever holding full logits.

A policy gradient needs two numbers per response token: log π(label) and, for the record or a bonus, the entropy of π. Plain
code gets them by writing out logits [T, V]: at 20,480 tokens and 152,064 words that is 12.5 GB in fp32, several times over. This
head does three things instead:

- it multiplies only the rows that predict a response token (prompt, padding and tool output cost nothing);
- it works through those rows in chunks, keeps four numbers per row, and builds each chunk's logits again in backward (or keeps
  them in the model's dtype while they fit a stated budget: then the gradient, not the value, sees their rounding);
- every tensor-parallel rank handles its own slice of the vocabulary, and the slices meet in two small all-reduces per
  micro-batch, whatever the number of chunks.

Letters: T packed tokens on this rank, R response rows on this rank, H hidden size, V vocabulary on this tensor-parallel rank.

With logits z = h·Wᵀ/temperature, m = max z, s = Σ exp(z − m), w = Σ exp(z − m)·(z − m):

    log π(label) = z_label − m − ln s            d/dz = onehot − p
    entropy      = ln s − w/s                    d/dz = −p·(z − m − w/s)
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from megatron_fipo.config import HeadConfig

PADDED_LOGIT = -1e30
"""Stands for minus infinity in the padded part of the vocabulary; finite, so that 0 × it stays 0."""


@dataclass(frozen=True)
class HeadRequest:
    """What the head needs to know of a micro-batch, and how to compute."""

    row_index: torch.Tensor
    """[R] int64: local tokens whose next token is a response token."""
    labels: torch.Tensor
    """[R] int64: that next token."""
    vocab_size: int
    """Real words; the rows of the output weight above it are padding."""
    temperature: float
    settings: HeadConfig
    entropy_gradient: bool
    """Whether the entropy is part of the loss; without it no memory is held for its gradient."""


@dataclass(frozen=True)
class _Slice:
    """The arithmetic that forward and backward share."""

    vocab_start: int
    valid_columns: int
    inverse_temperature: float
    chunk_size: int
    kept_chunks: int
    entropy_gradient: bool
    group: dist.ProcessGroup | None

    def scale_(self, logits: torch.Tensor) -> torch.Tensor:
        """Apply the temperature and put the padding out of the way, in place."""
        logits *= self.inverse_temperature
        logits[:, self.valid_columns :] = PADDED_LOGIT
        return logits

    def own_labels(self, labels: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """([rows, 1] column index within this slice, clamped; [rows, 1] whether the label is in it)."""
        local = (labels - self.vocab_start).unsqueeze(1)
        return local.clamp(0, columns - 1), (local >= 0) & (local < columns)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _product(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """left @ right in `dtype`. Rounding logits to bf16 would put noise of 0.01 on log-probs, which FutureKL adds up."""
    if left.dtype == dtype:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


class _LogProbAndEntropy(torch.autograd.Function):
    """(hidden [R, H], weight [V, H], labels [R]) -> (log_probs [R], entropy [R]) in fp32 (fp64 for fp64 input).

    Collectives over the tensor-parallel group: forward one MAX all-reduce of R floats and one SUM all-reduce of 3·R floats,
    backward none: the gradient of `hidden` is this vocabulary slice's part and the caller sums it.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, part: _Slice):
        rows = hidden.shape[0]
        dtype = _accumulation_dtype(hidden.dtype)
        peak, total, moment, target = hidden.new_zeros((4, rows), dtype=dtype)
        kept = []
        for index, start in enumerate(range(0, rows, part.chunk_size)):
            span = slice(start, start + part.chunk_size)
            logits = _product(hidden[span], weight.t(), dtype)
            if index < part.kept_chunks:
                kept.append(logits.to(weight.dtype, copy=True))
            part.scale_(logits)
            column, owned = part.own_labels(labels[span], logits.shape[1])
            peak[span] = logits.amax(dim=1)
            target[span] = torch.where(owned, logits.gather(1, column), 0).squeeze(1)
            logits -= peak[span].unsqueeze(1)
            weights = logits.exp()
            total[span] = weights.sum(dim=1)
            moment[span] = weights.mul_(logits).sum(dim=1)
        peak, total, moment, target = _meet(peak, total, moment, target, part.group)
        log_partition = peak + total.log()
        entropy = total.log() - moment / total
        ctx.part = part
        ctx.save_for_backward(hidden, weight, labels, log_partition, *([entropy] if part.entropy_gradient else []), *kept)
        if not part.entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return target - log_partition, entropy

    @staticmethod
    def backward(ctx, grad_log_probs, grad_entropy):
        part: _Slice = ctx.part
        hidden, weight, labels, log_partition, *rest = ctx.saved_tensors
        entropy = rest.pop(0) if part.entropy_gradient else None
        grad_hidden = torch.empty_like(hidden)
        accumulator = _WeightGradient(weight) if ctx.needs_input_grad[1] else None
        for index, start in enumerate(range(0, hidden.shape[0], part.chunk_size)):
            span = slice(start, start + part.chunk_size)
            dtype = log_partition.dtype
            kept = index < len(rest)
            logits = part.scale_(rest[index].to(dtype, copy=True) if kept else _product(hidden[span], weight.t(), dtype))
            column, owned = part.own_labels(labels[span], logits.shape[1])
            logits -= log_partition[span].unsqueeze(1)
            grad_row = grad_log_probs[span].unsqueeze(1)
            active = grad_row != 0
            if entropy is None:
                grad = logits.exp_().mul_(-grad_row * part.inverse_temperature)
            else:
                # z − m − w/s in the saved quantities: (z − log_partition) + entropy.
                grad_entropy_row = grad_entropy[span].unsqueeze(1)
                active = active | (grad_entropy_row != 0)
                grad = logits.exp()
                slope = logits.add_(entropy[span].unsqueeze(1)).mul_(grad_entropy_row).add_(grad_row)
                grad.mul_(slope.mul_(-part.inverse_temperature))
            grad.scatter_add_(1, column, torch.where(owned, grad_row * part.inverse_temperature, 0).to(grad.dtype))
            # A row without gradient contributes exactly nothing, even where its logits are NaN.
            grad = grad.masked_fill_(~active, 0).to(weight.dtype)
            grad_hidden[span] = grad @ weight
            if accumulator is not None:
                accumulator.add(grad, torch.where(active, hidden[span], 0))
        return grad_hidden, accumulator.result() if accumulator is not None else None, None, None


def _meet(peak, total, moment, target, group):
    """Combine the vocabulary slices: one MAX and one SUM all-reduce over the tensor-parallel group."""
    if group is None or dist.get_world_size(group) == 1 or peak.numel() == 0:
        return peak, total, moment, target
    local_peak, peak = peak, peak.clone()
    dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
    shift = local_peak - peak
    scale = shift.exp()
    sums = torch.stack((total * scale, (moment + shift * total) * scale, target))
    dist.all_reduce(sums, group=group)
    total, moment, target = sums
    return peak, total, moment, target


class _WeightGradient:
    """Sum over chunks of gradᵀ·hidden, in fp32; into Megatron's `main_grad` where the parameter has one.

    Then `grad_added_to_main_grad` tells the data-parallel hook not to add what backward returns, except for embeddings tied to
    the head on one pipeline stage: those carry `zero_out_wgrad`, and Megatron adds the (zero) return and the embedding's own gradient.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.main_grad: torch.Tensor | None = getattr(weight, "main_grad", None)
        dtype = _accumulation_dtype(weight.dtype)
        if self.main_grad is not None and self.main_grad.dtype == dtype:
            self.sum = self.main_grad
        else:
            self.sum = torch.zeros_like(weight, dtype=dtype)

    def add(self, grad: torch.Tensor, hidden: torch.Tensor) -> None:
        if grad.dtype == self.sum.dtype:
            self.sum.addmm_(grad.t(), hidden)
        else:
            self.sum += _product(grad.t(), hidden, self.sum.dtype)

    def result(self) -> torch.Tensor:
        if self.main_grad is None:
            return self.sum.to(self.weight.dtype)
        if self.sum is not self.main_grad:
            self.main_grad.add_(self.sum)
        self.weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        return torch.zeros_like(self.weight)


def _kept_chunks(rows: int, columns: int, weight: torch.Tensor, settings: HeadConfig) -> int:
    """How many chunks' logits fit the budget. Not worth holding where no gradient will be asked for."""
    if not torch.is_grad_enabled() or settings.logits_memory_mb == 0:
        return 0
    chunk_bytes = min(rows, settings.chunk_size) * columns * weight.element_size()
    return settings.logits_memory_mb * 2**20 // max(chunk_bytes, 1)


def response_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    request: HeadRequest,
    tensor_parallel_group: dist.ProcessGroup | None,
    sequence_parallel: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy of the response rows: two fp32 tensors [R].

    hidden: [T, 1, H], or this rank's [T/tp, 1, H] with sequence parallelism; after the final norm.
    weight: [V, H], this rank's slice of the output layer (or of the tied embedding).

    Collectives over the tensor-parallel group, besides the two all-reduces above (16·R bytes together): with sequence
    parallelism an all-gather of the hidden states forward and a reduce-scatter of their gradient backward (T·H elements each);
    without it an all-reduce of the gradient of the rows (R·H elements), because each vocabulary slice knows only its part.
    """
    tensor_parallel_size = dist.get_world_size(tensor_parallel_group) if tensor_parallel_group is not None else 1
    if sequence_parallel and tensor_parallel_size > 1:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=tensor_parallel_group)
    rows = hidden.squeeze(1).index_select(0, request.row_index)
    if not sequence_parallel and tensor_parallel_size > 1:
        rows = copy_to_tensor_model_parallel_region(rows, group=tensor_parallel_group)
    columns = weight.shape[0]
    rank = dist.get_rank(tensor_parallel_group) if tensor_parallel_size > 1 else 0
    part = _Slice(
        vocab_start=rank * columns,
        valid_columns=max(0, min(columns, request.vocab_size - rank * columns)),
        inverse_temperature=1.0 / request.temperature,
        chunk_size=request.settings.chunk_size,
        kept_chunks=_kept_chunks(rows.shape[0], columns, weight, request.settings),
        entropy_gradient=request.entropy_gradient,
        group=tensor_parallel_group,
    )
    return _LogProbAndEntropy.apply(rows, weight, request.labels, part)
