"""Log-probabilities of the response tokens, straight from hidden states, without ever holding full logits.

A policy gradient needs two numbers per response token: log π(label) and, for the record or a bonus, the entropy of π. Plain
code gets them by writing out logits [T, V]: at 20,480 tokens and 152,064 words that is 12.5 GB in fp32, several times over. This
head does three things instead:

- it multiplies only the rows that predict a response token (prompt, padding and tool output cost nothing);
- it walks over the vocabulary in slabs, all rows at once, keeps four numbers per row, and builds each slab's logits again in
  backward (or keeps them in the model's dtype while they fit a stated budget: then the gradient, not the value, sees their
  rounding). So the weight's gradient is one product per slab and micro-batch, added to `main_grad` where it lies;
- every tensor-parallel rank handles its own slice of the vocabulary, and the slices meet in two small all-reduces per
  micro-batch, whatever the number of slabs.

Letters: T packed tokens on this rank, R response rows on this rank, H hidden size, V vocabulary on this tensor-parallel rank, w
columns of a slab.

With logits z = h·Wᵀ/temperature, m = max z, s = Σ exp(z − m), u = Σ exp(z − m)·(z − m):

    log π(label) = z_label − m − ln s            d/dz = onehot − p
    entropy      = ln s − u/s                    d/dz = −p·(z − m − u/s)

What a slab needs besides products is in `head_passes.py`, or in Triton in `head_kernels.py`; everything here is the same for both.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from megatron_fipo.config import HeadConfig
from megatron_fipo.model.logprob_head import torch_passes as head_passes
from megatron_fipo.model.logprob_head.torch_passes import (
    PADDED_LOGIT,
    KeptLogits,
    RowGradient,
    Slab,
    accumulation_dtype,
    merged,
)
from megatron_fipo.objective.kernels.choice import takes_triton

SLAB_MULTIPLE = 128
"""Columns; matrix kernels are fast on multiples of it. Also the narrowest slab, whatever the budget."""
TRITON_DTYPES = (torch.bfloat16, torch.float32)


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
    """This rank's slice of the vocabulary, and how forward and backward walk over it."""

    columns: int
    first_word: int
    vocab_size: int
    inverse_temperature: float
    width: int
    """Columns of a slab; the last one may have fewer."""
    kept_slabs: int
    entropy_gradient: bool
    passes: ModuleType
    """`head_passes` or `head_kernels`."""
    group: dist.ProcessGroup | None

    def slabs(self) -> Iterator[Slab]:
        """Those that hold words: what is padding alone counts for nothing."""
        words = min(self.columns, self.vocab_size - self.first_word)
        for start in range(0, words, self.width):
            stop = min(start + self.width, self.columns)
            yield Slab(start, stop, self.first_word + start, min(stop, words) - start)


class _LogProbAndEntropy(torch.autograd.Function):
    """(hidden [R, H], weight [V, H], labels [R]) -> (log_probs [R], entropy [R]) in fp32 (fp64 for fp64 input).

    Memory, besides numbers per row: one slab as `head.workspace_mb` bounds it; `head.logits_memory_mb` from forward to backward;
    and in backward [R, H], the sum of the rows' gradients (fp32 where there are several slabs). `hidden` has to be a copy that nobody
    else reads: backward clears rows in it, so a second backward through the same graph is refused by autograd.

    Collectives over the tensor-parallel group: forward one MAX all-reduce of R floats and one SUM all-reduce of 3·R floats,
    backward none: the gradient of `hidden` is this vocabulary slice's part and the caller sums it.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, part: _Slice):
        rows, dtype = hidden.shape[0], accumulation_dtype(hidden.dtype)
        statistics = hidden.new_zeros((4, rows), dtype=dtype)
        statistics[0] = PADDED_LOGIT
        workspace = hidden.new_empty(rows * part.width, dtype=dtype)
        kept: list[KeptLogits] = []
        for index, slab in enumerate(part.slabs()):
            logits = _product(hidden, weight[slab.columns].t(), _matrix(workspace, rows, slab))
            keep = None
            if index < part.kept_slabs:
                keep = KeptLogits(torch.empty_like(logits, dtype=weight.dtype), logits.new_empty(rows))
                kept.append(keep)
            part.passes.add_to_statistics(logits, labels, slab, part.inverse_temperature, statistics, keep)
        peak, total, moment, target = _meet(statistics, part.group)
        log_partition = peak + total.log()
        entropy = total.log() - moment / total
        ctx.part = part
        ctx.save_for_backward(
            hidden,
            weight,
            labels,
            log_partition,
            entropy if part.entropy_gradient else None,
            *(tensor for keep in kept for tensor in (keep.distances, keep.peak)),
        )
        if not part.entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return target - log_partition, entropy

    @staticmethod
    def backward(ctx, grad_log_probs, grad_entropy):
        part: _Slice = ctx.part
        hidden, weight, labels, log_partition, entropy, *kept = ctx.saved_tensors
        rows, dtype = hidden.shape[0], log_partition.dtype
        gradient = RowGradient(
            labels,
            grad_log_probs.contiguous(),
            None if entropy is None else grad_entropy.contiguous(),
            entropy,
            part.inverse_temperature,
        )
        # A row without gradient contributes exactly nothing, even where it is NaN. In place: the rows are the head's own copy.
        hidden.masked_fill_(~gradient.active().unsqueeze(1), 0)
        workspace = hidden.new_empty(rows * part.width, dtype=dtype)
        out = workspace if weight.dtype == dtype else hidden.new_empty(rows * part.width, dtype=weight.dtype)
        grad_hidden = torch.zeros_like(hidden, dtype=hidden.dtype if part.width == part.columns else dtype)
        weight_gradient = _WeightGradient(weight) if ctx.needs_input_grad[1] else None
        logits = grad = workspace  # where the slice is padding alone, there is no slab
        for index, slab in enumerate(part.slabs()):
            if index < part.kept_slabs:
                logits, peak = kept[2 * index : 2 * index + 2]
                scale, shift = 1.0, peak - log_partition
            else:
                logits = _product(hidden, weight[slab.columns].t(), _matrix(workspace, rows, slab))
                scale, shift = part.inverse_temperature, -log_partition
            grad = _matrix(out, rows, slab)
            part.passes.write_gradient(logits, scale, shift, gradient, slab, grad)
            _add_product(grad_hidden, grad, weight[slab.columns])
            if weight_gradient is not None:
                _add_product(weight_gradient.sum[slab.columns], grad.t(), hidden)
        del workspace, out, logits, grad  # before the last conversion, which would be the peak
        return (
            grad_hidden.to(hidden.dtype),
            None if weight_gradient is None else weight_gradient.returned(),
            None,
            None,
        )


def _meet(statistics: torch.Tensor, group: dist.ProcessGroup | None) -> tuple[torch.Tensor, ...]:
    """Combine the vocabulary slices: one MAX and one SUM all-reduce over the tensor-parallel group."""
    peak, total, moment, target = statistics
    if group is None or dist.get_world_size(group) == 1 or peak.numel() == 0:
        return peak, total, moment, target
    highest = peak.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    sums = torch.stack((*merged(peak, total, moment, highest), target))
    dist.all_reduce(sums, group=group)
    return highest, *sums


def _matrix(workspace: torch.Tensor, rows: int, slab: Slab) -> torch.Tensor:
    """The beginning of `workspace` as a contiguous [R, w]."""
    width = slab.stop - slab.start
    return workspace[: rows * width].view(rows, width)


def _product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """left @ right into `out`, in its dtype. Rounding logits to bf16 would put noise of 0.01 on log-probs, which FutureKL adds up."""
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    if left.device.type == "cpu":  # has no product of another dtype than its factors'
        return torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)
    return torch.mm(left, right, out_dtype=out.dtype, out=out)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, in the dtype of `total`, without a temporary of its size."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.device.type == "cpu":
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


class _WeightGradient:
    """`sum` [V, H], to which the slabs add: Megatron's `main_grad` (fp32) where the parameter has one, else what backward returns."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.main_grad: torch.Tensor | None = getattr(weight, "main_grad", None)
        self.sum = torch.zeros_like(weight) if self.main_grad is None else self.main_grad

    def returned(self) -> torch.Tensor:
        """What autograd gets. With `main_grad` a stand-in: the data-parallel hook wants to see a gradient, but does not read it.

        An embedding tied to the head on one pipeline stage carries `zero_out_wgrad`: autograd adds the embedding's own gradient to
        what is returned here, and the hook adds the sum to `main_grad`. That needs true zeros, as the weight. All
        other weights return themselves: no memory, and autograd takes the alias over as `weight.grad` until the hook drops it.
        Where nobody dropped the last one, autograd would add this one to it, and with it to the weight: there, zeros too.
        """
        if self.main_grad is None:
            return self.sum
        self.weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        if getattr(self.weight, "zero_out_wgrad", False) or self.weight.grad is not None:
            return torch.zeros_like(self.weight)
        return self.weight.detach()


def _slab_width(rows: int, columns: int, bytes_per_logit: int, workspace_mb: int) -> int:
    """Columns whose logits fit the budget: a multiple of 128, at least 128, at most all."""
    width = workspace_mb * 2**20 // (max(rows, 1) * bytes_per_logit) // SLAB_MULTIPLE * SLAB_MULTIPLE
    return min(columns, max(SLAB_MULTIPLE, width))


def _kept_slabs(rows: int, width: int, weight: torch.Tensor, settings: HeadConfig) -> int:
    """How many slabs' logits fit the budget. Not worth holding where no gradient will be asked for."""
    if not torch.is_grad_enabled():
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

    Raises ValueError where `head.kernels` asks for Triton and it cannot run.

    Collectives over the tensor-parallel group, besides the two all-reduces above (16·R bytes together): with sequence
    parallelism an all-gather of the hidden states forward and a reduce-scatter of their gradient backward (T·H elements each);
    without it an all-reduce of the gradient of the rows (R·H elements), because each vocabulary slice knows only its part.
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
    passes = _passes(settings.kernels, rows)
    width = _slab_width(rows.shape[0], columns, passes.bytes_per_logit(weight.dtype), settings.workspace_mb)
    part = _Slice(
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
    return _LogProbAndEntropy.apply(rows, weight, request.labels, part)


def _passes(kernels: str, rows: torch.Tensor) -> ModuleType:
    """The two passes over a slab, in Triton or in plain torch."""
    if not takes_triton(kernels, rows, TRITON_DTYPES):
        return head_passes
    from megatron_fipo.objective.kernels import (
        triton_head as head_kernels,  # imports Triton, which is not everywhere
    )

    return head_kernels
