"""The slab passes of the head (`model/logprob_head/slab.py`: `SlabPasses`) as Triton kernels.

Statistics take one read of a slab's logits, the gradient one read and one write. Arithmetic is fp32 for every
gradient dtype. No atomics: a row's result depends on that row alone and is deterministic.
"""

import torch
import triton
import triton.language as tl

from megatron_fipo.model.logprob_head.slab import PADDED_LOGIT, KeptLogits, RowGradient, Slab

BLOCK = 1024
"""Columns processed together by a program; with 4 warps each thread has 8 of them, two 16-byte loads."""

PADDED = tl.constexpr(PADDED_LOGIT)


@triton.jit(do_not_specialize=["rows", "first_word"])
def statistics_kernel(
    logits,
    labels,
    statistics,
    kept,
    kept_peak,
    rows,
    width,
    words,
    first_word,
    scale,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row.

    Each lane keeps its own statistics: one exponential per logit and no reduction in the loop.
    """
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    peak = tl.full([BLOCK], PADDED, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    for start in range(0, words, BLOCK):
        column = start + lane
        z = tl.load(logits + row * width + column, mask=column < words, other=0.0) * scale
        z = tl.where(column < words, z, PADDED)
        higher = z > peak
        gap = tl.where(higher, peak - z, z - peak)
        factor = tl.exp(gap)
        moment = tl.where(higher, (moment + gap * total) * factor, moment + gap * factor)
        total = tl.where(higher, total * factor + 1.0, total + factor)
        peak = tl.where(higher, z, peak)
    slab_peak = tl.max(peak, 0)
    if KEEP:
        tl.store(kept_peak + row, slab_peak)
        for start in range(0, words, BLOCK):
            column = start + lane
            z = tl.load(logits + row * width + column, mask=column < words, other=0.0) * scale
            tl.store(
                kept + row * width + column, (z - slab_peak).to(kept.dtype.element_ty), mask=column < words
            )
    # Lanes without a logit, and the initial statistics, have a total of 0 at the padded peak: they contribute
    # 0.
    old_peak = tl.load(statistics + row)
    old_total = tl.load(statistics + rows + row)
    old_moment = tl.load(statistics + 2 * rows + row)
    highest = tl.maximum(old_peak, slab_peak)
    shift = peak - highest
    factor = tl.exp(shift)
    old_shift = old_peak - highest
    old_factor = tl.exp(old_shift)
    label = tl.load(labels + row) - first_word
    target = tl.load(logits + row * width + label, mask=(label >= 0) & (label < words), other=0.0) * scale
    tl.store(statistics + row, highest)
    tl.store(statistics + rows + row, old_total * old_factor + tl.sum(total * factor, 0))
    tl.store(
        statistics + 2 * rows + row,
        (old_moment + old_shift * old_total) * old_factor + tl.sum((moment + shift * total) * factor, 0),
    )
    tl.store(statistics + 3 * rows + row, tl.load(statistics + 3 * rows + row) + target)


@triton.jit(do_not_specialize=["first_word"], do_not_specialize_on_alignment=["entropy_gradients"])
def gradient_kernel(
    logits,
    shifts,
    labels,
    gradients,
    entropy_gradients,
    entropies,
    out,
    width,
    words,
    first_word,
    scale,
    inverse_temperature,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row and block of columns.

    `out` may be `logits`: the program that read an element writes it.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gradient = tl.load(gradients + row)
    counting = tl.where(gradient != 0.0, words, 0)
    if ENTROPY:
        entropy_gradient = tl.load(entropy_gradients + row)
        counting = tl.where(entropy_gradient != 0.0, words, counting)
    counts = column < counting
    z = tl.load(logits + row * width + column, mask=counts, other=0.0).to(tl.float32)
    log_p = z * scale + tl.load(shifts + row)
    slope = gradient
    if ENTROPY:
        slope = gradient + entropy_gradient * (log_p + tl.load(entropies + row))
    onehot = tl.where(column == tl.load(labels + row) - first_word, gradient, 0.0)
    result = (onehot - tl.exp(log_p) * slope) * inverse_temperature
    result = tl.where(counts, result, 0.0)
    tl.store(out + row * width + column, result.to(out.dtype.element_ty), mask=column < width)


def bytes_per_logit(dtype: torch.dtype) -> int:
    """As `SlabPasses`: the logits, and the gradient if it cannot overwrite them."""
    return 4 if dtype == torch.float32 else 4 + dtype.itemsize


def add_to_statistics(
    logits: torch.Tensor,
    labels: torch.Tensor,
    slab: Slab,
    inverse_temperature: float,
    statistics: torch.Tensor,
    kept: KeptLogits | None,
) -> None:
    """As `SlabPasses`; `logits` are not changed."""
    rows, width = logits.shape
    if rows == 0:
        return
    statistics_kernel[(rows,)](
        logits,
        labels,
        statistics,
        kept.distances if kept is not None else logits,
        kept.peak if kept is not None else logits,
        rows,
        width,
        slab.words,
        slab.first_word,
        inverse_temperature,
        KEEP=kept is not None,
        BLOCK=BLOCK,
        num_warps=4,
    )


def write_gradient(
    logits: torch.Tensor,
    scale: float,
    shift: torch.Tensor,
    gradient: RowGradient,
    slab: Slab,
    out: torch.Tensor,
) -> None:
    """As `SlabPasses`."""
    rows, width = logits.shape
    if rows == 0:
        return
    gradient_kernel[(rows, triton.cdiv(width, BLOCK))](
        logits,
        shift,
        gradient.labels,
        gradient.log_probs,
        gradient.entropy if gradient.entropy is not None else shift,
        gradient.entropy_value if gradient.entropy_value is not None else shift,
        out,
        width,
        slab.words,
        slab.first_word,
        scale,
        gradient.inverse_temperature,
        ENTROPY=gradient.entropy is not None,
        BLOCK=BLOCK,
        num_warps=4,
    )
