"""The two passes over a slab's logits that are not matrix products, in plain torch: into row statistics, and into gradients.

`head_kernels.py` holds the same functions as Triton kernels. The walk over the slabs, the products and the collectives are in
`head.py`, once for both.

Letters: R response rows, w columns of the slab. Statistics are the four rows of a [4, R] tensor: with the logits z that were
seen so far, m = max z, Σ exp(z − m), Σ exp(z − m)·(z − m), and the label's z (0 until its slab comes).
"""

from dataclasses import dataclass

import torch

PADDED_LOGIT = -1e30
"""Stands for minus infinity, in the padded part of the vocabulary and before any logit was seen; finite, so that 0 × it stays 0."""


@dataclass(frozen=True)
class Slab:
    """Neighbouring columns of this rank's vocabulary slice."""

    start: int
    stop: int
    first_word: int
    """The word of column `start`."""
    words: int
    """Columns that stand for words, at least one; those behind them are padding."""

    @property
    def columns(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class KeptLogits:
    """A slab's logits for backward, as distances from each row's highest: rounding is smallest where the probability is largest."""

    distances: torch.Tensor
    """[R, w] in the model's dtype; undefined in the padding."""
    peak: torch.Tensor
    """[R], the accumulation dtype."""


@dataclass(frozen=True)
class RowGradient:
    """What backward knows of each row. d loss/dz = inverse_temperature · (a·onehot − p·(a + b·(ln p + entropy)))."""

    labels: torch.Tensor
    """[R] int64."""
    log_probs: torch.Tensor
    """[R]: a, the gradient of the loss by log π(label)."""
    entropy: torch.Tensor | None
    """[R]: b, the gradient by the entropy, or None where the entropy is not part of the loss."""
    entropy_value: torch.Tensor | None
    inverse_temperature: float

    def active(self) -> torch.Tensor:
        """[R]: which rows have a gradient at all."""
        active = self.log_probs != 0
        return active if self.entropy is None else active | (self.entropy != 0)


def bytes_per_logit(dtype: torch.dtype) -> int:
    """Most bytes that exist at one time for each element of a slab, with weights of `dtype`, kept logits aside.

    Forward: the logits and their exponentials. Backward: the probabilities and their slopes beside the logits, or in their
    place where the gradient has their dtype; else the gradient too. Half precision on a CPU also widens what it multiplies.
    """
    wide = accumulation_dtype(dtype).itemsize
    return 2 * wide if dtype.itemsize == wide else 3 * wide + dtype.itemsize


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What logits, statistics and sums are held in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merged(
    peak: torch.Tensor, total: torch.Tensor, moment: torch.Tensor, other_peak: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(total, moment) as they are for `other_peak` ≥ peak, so that they can be added to those of other columns. All [R]."""
    shift = peak - other_peak
    scale = shift.exp()
    return total * scale, (moment + shift * total) * scale


def add_to_statistics(
    logits: torch.Tensor,
    labels: torch.Tensor,
    slab: Slab,
    inverse_temperature: float,
    statistics: torch.Tensor,
    kept: KeptLogits | None,
) -> None:
    """Add a slab to the `statistics` [4, R] of the slabs before it, in place, and fill `kept`.

    logits: [R, w] fp32 (fp64), before the temperature; overwritten. labels: [R] int64.
    """
    logits *= inverse_temperature
    logits[:, slab.words :] = PADDED_LOGIT
    column, owned = _label_columns(labels, slab)
    target = torch.where(owned, logits.gather(1, column), 0).squeeze(1)
    peak = logits.amax(dim=1)
    logits -= peak.unsqueeze(1)
    if kept is not None:
        kept.distances.copy_(logits)
        kept.peak.copy_(peak)
    weights = logits.exp()
    total = weights.sum(dim=1)
    moment = weights.mul_(logits).sum(dim=1)
    old_peak, old_total, old_moment, old_target = statistics
    highest = torch.maximum(old_peak, peak)
    old_total, old_moment = merged(old_peak, old_total, old_moment, highest)
    new_total, new_moment = merged(peak, total, moment, highest)
    torch.stack(
        (highest, old_total + new_total, old_moment + new_moment, old_target + target), out=statistics
    )


def write_gradient(
    logits: torch.Tensor,
    scale: float,
    shift: torch.Tensor,
    gradient: RowGradient,
    slab: Slab,
    out: torch.Tensor,
) -> None:
    """Write the gradient by the slab's logits (before the temperature) to `out` [R, w], which may be `logits` itself.

    logits: [R, w], such that logits · scale + shift is the log-probability; shift: [R]. A row whose gradients are zero gets exact
    zeros, even where its logits are NaN.
    """
    log_p = torch.add(shift.unsqueeze(1), logits, alpha=scale, out=out if out.dtype == shift.dtype else None)
    log_p[:, slab.words :] = PADDED_LOGIT
    row = gradient.log_probs.unsqueeze(1)
    if gradient.entropy is None or gradient.entropy_value is None:
        result = log_p.exp_().mul_(-row * gradient.inverse_temperature)
    else:
        entropy_row = gradient.entropy.unsqueeze(1)
        p = log_p.exp()
        slope = log_p.add_(gradient.entropy_value.unsqueeze(1)).mul_(entropy_row).add_(row)
        result = slope.mul_(-gradient.inverse_temperature).mul_(p)
    column, owned = _label_columns(gradient.labels, slab)
    result.scatter_add_(1, column, torch.where(owned, row * gradient.inverse_temperature, 0).to(result.dtype))
    result.masked_fill_(~gradient.active().unsqueeze(1), 0)
    if result is not out:
        out.copy_(result)


def _label_columns(labels: torch.Tensor, slab: Slab) -> tuple[torch.Tensor, torch.Tensor]:
    """([R, 1] the label's column in the slab, clamped; [R, 1] whether it is in it)."""
    local = (labels - slab.first_word).unsqueeze(1)
    return local.clamp(0, slab.stop - slab.start - 1), (local >= 0) & (local < slab.words)
