"""The slab passes of the head (`slab.SlabPasses`) in plain torch."""

import torch

from megatron_fipo.model.logprob_head.slab import PADDED_LOGIT, KeptLogits, RowGradient, Slab


def bytes_per_logit(dtype: torch.dtype) -> int:
    """As `SlabPasses`.

    Forward: the logits and their exponentials. Backward: the probabilities and their slopes, in place of the
    logits if the gradient has the logits' dtype, else in addition to the logits and the gradient. In half
    precision on a CPU, the factors of a product are also converted to float32.
    """
    wide = accumulation_dtype(dtype).itemsize
    return 2 * wide if dtype.itemsize == wide else 3 * wide + dtype.itemsize


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, statistics and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rescale_sums(
    peak: torch.Tensor, total: torch.Tensor, moment: torch.Tensor, new_peak: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(total, moment) relative to `new_peak` ≥ peak, so that different columns can be added. All [R]."""
    shift = peak - new_peak
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
    """As `SlabPasses`; `logits` are overwritten."""
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
    old_total, old_moment = rescale_sums(old_peak, old_total, old_moment, highest)
    new_total, new_moment = rescale_sums(peak, total, moment, highest)
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
    """As `SlabPasses`."""
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
    """([R, 1] the label's column in the slab, clamped; [R, 1] whether the label is in the slab)."""
    local = (labels - slab.first_word).unsqueeze(1)
    return local.clamp(0, slab.stop - slab.start - 1), (local >= 0) & (local < slab.words)
