"""Log-probabilities and entropy of the response tokens from hidden states, without materializing full logits.

A policy gradient needs two numbers per response token: log π(label) and, for a metric or a bonus, the entropy
of π. A plain implementation materializes the logits [T, V]: at 20,480 tokens and a vocabulary of 152,064 that
is 12.5 GB in fp32, several times. This head does the following instead:

- It multiplies only the rows that predict a response token (prompt, padding and tool output cost nothing).
- It processes the vocabulary in slabs, all rows at once, and keeps four numbers per row. Backward recomputes
  each slab's logits, or reads them if they were kept in the model's dtype within a given memory budget (their
  rounding then affects the gradient, not the value). The weight's gradient is one product per slab and
  micro-batch, added directly to `main_grad`.
- Every tensor-parallel rank handles its own slice of the vocabulary. The slices are combined by two small
  all-reduces per micro-batch, independent of the number of slabs.

Notation: T packed tokens on this rank, R response rows on this rank, H hidden size, V vocabulary on this
tensor-parallel rank, w columns of a slab.

With logits z = h·Wᵀ/temperature, m = max z, s = Σ exp(z − m), u = Σ exp(z − m)·(z − m):

    log π(label) = z_label − m − ln s            d/dz = onehot − p
    entropy      = ln s − u/s                    d/dz = −p·(z − m − u/s)

The elementwise work on a slab is the interface `SlabPasses` (`slab.py`), implemented in
`torch_passes.py` and, for Triton, in `model/logprob_head/triton_passes.py`. Everything in this file is the same
for both.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from megatron_fipo.config import HeadConfig
from megatron_fipo.model.logprob_head import torch_passes
from megatron_fipo.model.logprob_head.slab import PADDED_LOGIT, KeptLogits, RowGradient, Slab, SlabPasses
from megatron_fipo.model.logprob_head.torch_passes import accumulation_dtype, rescale_sums
from megatron_fipo.objective.kernels.choice import takes_triton

SLAB_MULTIPLE = 128
"""Columns. Matrix kernels are fast on multiples of it. It is also the minimum width of a slab for any
budget."""
TRITON_DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class HeadRequest:
    """The head's input for a micro-batch, and how to compute."""

    row_index: torch.Tensor
    """[R] int64: local tokens whose next token is a response token."""
    labels: torch.Tensor
    """[R] int64: that next token."""
    vocab_size: int
    """Real vocabulary entries; the output weight's rows from this index on are padding."""
    temperature: float
    settings: HeadConfig
    entropy_gradient: bool
    """Whether the entropy is part of the loss. If not, no memory is used for its gradient."""


@dataclass(frozen=True)
class _VocabSlice:
    """This rank's slice of the vocabulary, and how forward and backward divide it into slabs."""

    columns: int
    first_word: int
    vocab_size: int
    inverse_temperature: float
    width: int
    """Columns of a slab; the last one may have fewer."""
    kept_slabs: int
    entropy_gradient: bool
    passes: SlabPasses
    group: dist.ProcessGroup | None

    def slabs(self) -> Iterator[Slab]:
        """The slabs with at least one vocabulary entry. Slabs of padding only are skipped."""
        words = min(self.columns, self.vocab_size - self.first_word)
        for start in range(0, words, self.width):
            stop = min(start + self.width, self.columns)
            yield Slab(start, stop, self.first_word + start, min(stop, words) - start)


class _LogProbAndEntropy(torch.autograd.Function):
    """(hidden [R, H], weight [V, H], labels [R]) -> (log_probs [R], entropy [R]), fp32 (fp64 for fp64 input).

    Memory, besides a few numbers per row: one slab, bounded by `head.workspace_mb`; kept logits from forward
    to backward, bounded by `head.logits_memory_mb`; and in backward [R, H], the sum of the rows' gradients
    (fp32 with several slabs). `hidden` must be a copy that nothing else reads: backward clears rows in it, so
    autograd refuses a second backward through the same graph.

    Collectives over the tensor-parallel group: forward one MAX all-reduce of R floats and one SUM all-reduce
    of 3·R floats. Backward none: the gradient of `hidden` covers this vocabulary slice only, and the caller
    sums it.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, vocab_slice: _VocabSlice):
        rows, dtype = hidden.shape[0], accumulation_dtype(hidden.dtype)
        statistics = hidden.new_zeros((4, rows), dtype=dtype)
        statistics[0] = PADDED_LOGIT
        workspace = hidden.new_empty(rows * vocab_slice.width, dtype=dtype)
        kept: list[KeptLogits] = []
        for index, slab in enumerate(vocab_slice.slabs()):
            logits = _product(hidden, weight[slab.columns].t(), _matrix(workspace, rows, slab))
            keep = None
            if index < vocab_slice.kept_slabs:
                keep = KeptLogits(torch.empty_like(logits, dtype=weight.dtype), logits.new_empty(rows))
                kept.append(keep)
            vocab_slice.passes.add_to_statistics(
                logits, labels, slab, vocab_slice.inverse_temperature, statistics, keep
            )
        peak, total, moment, target = _reduce_over_slices(statistics, vocab_slice.group)
        log_partition = peak + total.log()
        entropy = total.log() - moment / total
        ctx.vocab_slice = vocab_slice
        ctx.save_for_backward(
            hidden,
            weight,
            labels,
            log_partition,
            entropy if vocab_slice.entropy_gradient else None,
            *(tensor for keep in kept for tensor in (keep.distances, keep.peak)),
        )
        if not vocab_slice.entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return target - log_partition, entropy

    @staticmethod
    def backward(ctx, grad_log_probs, grad_entropy):
        vocab_slice: _VocabSlice = ctx.vocab_slice
        hidden, weight, labels, log_partition, entropy, *kept = ctx.saved_tensors
        rows, dtype = hidden.shape[0], log_partition.dtype
        gradient = RowGradient(
            labels,
            grad_log_probs.contiguous(),
            None if entropy is None else grad_entropy.contiguous(),
            entropy,
            vocab_slice.inverse_temperature,
        )
        # A row without gradient contributes exactly 0, even if it is NaN. In place: the rows are the head's
        # own copy.
        hidden.masked_fill_(~gradient.active().unsqueeze(1), 0)
        workspace = hidden.new_empty(rows * vocab_slice.width, dtype=dtype)
        out = (
            workspace
            if weight.dtype == dtype
            else hidden.new_empty(rows * vocab_slice.width, dtype=weight.dtype)
        )
        grad_hidden = torch.zeros_like(
            hidden, dtype=hidden.dtype if vocab_slice.width == vocab_slice.columns else dtype
        )
        weight_gradient = _WeightGradient(weight) if ctx.needs_input_grad[1] else None
        logits = grad = workspace  # defined even if the slice is padding only and has no slab
        for index, slab in enumerate(vocab_slice.slabs()):
            if index < vocab_slice.kept_slabs:
                logits, peak = kept[2 * index : 2 * index + 2]
                scale, shift = 1.0, peak - log_partition
            else:
                logits = _product(hidden, weight[slab.columns].t(), _matrix(workspace, rows, slab))
                scale, shift = vocab_slice.inverse_temperature, -log_partition
            grad = _matrix(out, rows, slab)
            vocab_slice.passes.write_gradient(logits, scale, shift, gradient, slab, grad)
            _add_product(grad_hidden, grad, weight[slab.columns])
            if weight_gradient is not None:
                _add_product(weight_gradient.sum[slab.columns], grad.t(), hidden)
        del workspace, out, logits, grad  # before the final conversion, which would be the memory peak
        return (
            grad_hidden.to(hidden.dtype),
            None if weight_gradient is None else weight_gradient.returned(),
            None,
            None,
        )


def _reduce_over_slices(
    statistics: torch.Tensor, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, ...]:
    """Combine the vocabulary slices: one MAX and one SUM all-reduce over the tensor-parallel group."""
    peak, total, moment, target = statistics
    if group is None or dist.get_world_size(group) == 1 or peak.numel() == 0:
        return peak, total, moment, target
    highest = peak.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    sums = torch.stack((*rescale_sums(peak, total, moment, highest), target))
    dist.all_reduce(sums, group=group)
    return highest, *sums


def _matrix(workspace: torch.Tensor, rows: int, slab: Slab) -> torch.Tensor:
    """The first R·w elements of `workspace` as a contiguous [R, w]."""
    width = slab.stop - slab.start
    return workspace[: rows * width].view(rows, width)


def _product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """left @ right into `out`, in the dtype of `out`.

    Rounding logits to bf16 would add noise of 0.01 to log-probs, which FutureKL accumulates.
    """
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    if left.device.type == "cpu":  # torch has no mixed-precision product on CPUs
        return torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)
    return torch.mm(left, right, out_dtype=out.dtype, out=out)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, in the dtype of `total`, without a temporary of that size."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.device.type == "cpu":
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


class _WeightGradient:
    """`sum` [V, H] accumulates the slabs' weight gradients.

    It is Megatron's `main_grad` (fp32) if the parameter has one, else the gradient that backward returns.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.main_grad: torch.Tensor | None = getattr(weight, "main_grad", None)
        self.sum = torch.zeros_like(weight) if self.main_grad is None else self.main_grad

    def returned(self) -> torch.Tensor:
        """The gradient for autograd.

        With `main_grad` it is a placeholder: the data-parallel hook checks that it exists.

        An embedding that is tied to the head on one pipeline stage has `zero_out_wgrad`: autograd adds the
        embedding's own gradient to the returned tensor, and the hook adds that sum to `main_grad`. This
        requires true zeros in the shape of the weight. All other weights return themselves: no memory is
        needed, and autograd keeps the alias as `weight.grad` until the hook drops it. If the previous one was
        not dropped, autograd would add this one to it and so change the weight. In that case zeros are
        returned too.
        """
        if self.main_grad is None:
            return self.sum
        self.weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        if getattr(self.weight, "zero_out_wgrad", False) or self.weight.grad is not None:
            return torch.zeros_like(self.weight)
        return self.weight.detach()


def _slab_width(rows: int, columns: int, bytes_per_logit: int, workspace_mb: int) -> int:
    """Columns whose logits fit the budget: a multiple of 128, at least 128, at most all columns."""
    width = workspace_mb * 2**20 // (max(rows, 1) * bytes_per_logit) // SLAB_MULTIPLE * SLAB_MULTIPLE
    return min(columns, max(SLAB_MULTIPLE, width))


def _kept_slabs(rows: int, width: int, weight: torch.Tensor, settings: HeadConfig) -> int:
    """Number of slabs whose logits fit the budget; 0 if no gradient will be computed, and while there is no budget."""
    if not torch.is_grad_enabled() or not settings.logits_memory_mb:
        return 0
    columns = settings.logits_memory_mb * 2**20 // (max(rows, 1) * weight.element_size())
    return columns // width if columns < weight.shape[0] else math.ceil(weight.shape[0] / width)


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

    Raises ValueError if `head.kernels` asks for Triton and it cannot run.

    Collectives over the tensor-parallel group, in addition to the two all-reduces of `_LogProbAndEntropy`
    (16·R bytes together). With sequence parallelism: an all-gather of the hidden states forward and a
    reduce-scatter of their gradient backward (T·H elements each). Without: an all-reduce of the gradient of
    the rows (R·H elements), because each vocabulary slice contributes only its share.
    """
    tensor_parallel_size = (
        dist.get_world_size(tensor_parallel_group) if tensor_parallel_group is not None else 1
    )
    if sequence_parallel and tensor_parallel_size > 1:
        hidden = gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=True, group=tensor_parallel_group
        )
    rows = hidden.squeeze(1).index_select(0, request.row_index)
    if not sequence_parallel and tensor_parallel_size > 1:
        rows = copy_to_tensor_model_parallel_region(rows, group=tensor_parallel_group)
    settings, columns = request.settings, weight.shape[0]
    passes = _choose_passes(settings.kernels, rows)
    width = _slab_width(rows.shape[0], columns, passes.bytes_per_logit(weight.dtype), settings.workspace_mb)
    vocab_slice = _VocabSlice(
        columns=columns,
        first_word=columns * (dist.get_rank(tensor_parallel_group) if tensor_parallel_size > 1 else 0),
        vocab_size=request.vocab_size,
        inverse_temperature=1.0 / request.temperature,
        width=width,
        kept_slabs=_kept_slabs(rows.shape[0], width, weight, settings),
        entropy_gradient=request.entropy_gradient,
        passes=passes,
        group=tensor_parallel_group,
    )
    return _LogProbAndEntropy.apply(rows, weight, request.labels, vocab_slice)


def _choose_passes(kernels: str, rows: torch.Tensor) -> SlabPasses:
    """The Triton or plain torch implementation, chosen by `head.kernels` and the rows' device and dtype."""
    if not takes_triton(kernels, rows, TRITON_DTYPES):
        return torch_passes
    from megatron_fipo.model.logprob_head import triton_passes  # imports Triton, an optional dependency

    return triton_passes
