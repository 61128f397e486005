"""The interface between the head and the passes that it runs on each slab of logits.

Two modules implement `SlabPasses`: `torch_passes` and `model/logprob_head/triton_passes.py`. The loop over
slabs, the matrix products and the collectives are in `head.py` and are the same for both.

Notation: R response rows, w columns of the slab. Statistics are the four rows of a [4, R] tensor. With z the
logits seen so far: m = max z, Σ exp(z − m), Σ exp(z − m)·(z − m), and the label's z (0 until its slab is
reached).
"""

from dataclasses import dataclass
from typing import Protocol

import torch

PADDED_LOGIT = -1e30
"""Represents minus infinity: in the padded part of the vocabulary and before any logit was seen. Finite, so 0
× it is 0."""


@dataclass(frozen=True)
class Slab:
    """Adjacent columns of this rank's vocabulary slice."""

    start: int
    stop: int
    first_word: int
    """Vocabulary index of column `start`."""
    words: int
    """Number of columns with a vocabulary entry, at least one. They come first; the columns after them are
    padding."""

    @property
    def columns(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class KeptLogits:
    """A slab's logits saved for backward, relative to each row's maximum.

    Rounding errors are therefore smallest for the largest probabilities.
    """

    distances: torch.Tensor
    """[R, w] in the model's dtype; undefined in the padding."""
    peak: torch.Tensor
    """[R] in the accumulation dtype: each row's maximum."""


@dataclass(frozen=True)
class RowGradient:
    """Per-row input of backward.

    d loss/dz = inverse_temperature · (a·onehot − p·(a + b·(ln p + entropy))).
    """

    labels: torch.Tensor
    """[R] int64."""
    log_probs: torch.Tensor
    """[R]: a, the gradient of the loss with respect to log π(label)."""
    entropy: torch.Tensor | None
    """[R]: b, the gradient of the loss with respect to the entropy. None if the entropy is not part of the
    loss."""
    entropy_value: torch.Tensor | None
    """[R]: the entropy itself. None if the entropy is not part of the loss."""
    inverse_temperature: float

    def active(self) -> torch.Tensor:
        """bool [R]: rows with a non-zero gradient."""
        active = self.log_probs != 0
        return active if self.entropy is None else active | (self.entropy != 0)


class SlabPasses(Protocol):
    """The elementwise work on a slab's logits: into row statistics (forward) and into gradients (backward).

    A module with these three functions is an implementation.
    """

    def bytes_per_logit(self, dtype: torch.dtype) -> int:
        """Peak bytes per element of a slab for weights of `dtype`, kept logits not counted."""
        ...

    def add_to_statistics(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        slab: Slab,
        inverse_temperature: float,
        statistics: torch.Tensor,
        kept: KeptLogits | None,
    ) -> None:
        """Add a slab to the `statistics` [4, R] of the previous slabs, in place, and fill `kept`.

        logits: [R, w] fp32 (fp64), before the temperature; may be overwritten. labels: [R] int64.
        """
        ...

    def write_gradient(
        self,
        logits: torch.Tensor,
        scale: float,
        shift: torch.Tensor,
        gradient: RowGradient,
        slab: Slab,
        out: torch.Tensor,
    ) -> None:
        """Write the gradient with respect to the slab's logits (before the temperature) to `out` [R, w].

        `out` may be `logits` itself. logits: [R, w], such that logits · scale + shift is the log-probability;
        shift: [R]. A row with zero gradients gets exact zeros, even if its logits are NaN.
        """
        ...
