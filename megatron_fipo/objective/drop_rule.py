"""Step 7, the drop rule: which responses are kept, and the weight of their tokens. The same on every context-parallel rank.

Notation: S sequences in the micro-batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fipo.objective.config import ObjectiveConfig
from megatron_fipo.objective.loss_inputs import PolicyRows


@dataclass(frozen=True)
class KeptSequences:
    """The decision for each response."""

    non_finite: Tensor
    """bool [S]: a number of one of its rows is not finite."""
    dropped: Tensor
    """bool [S]: excluded by the drop rule."""
    kept: Tensor
    """bool [S]: neither of the two."""
    weight: Tensor
    """[S]: weight of each of its kept rows in the loss sum."""
    reference_weight: Tensor
    """0-d: that weight in the authors' mean per micro-batch, sequences / kept tokens over all context-parallel ranks."""


@torch.no_grad()
def apply_drop_rule(counts: Tensor, rows: PolicyRows, objective: ObjectiveConfig) -> KeptSequences:
    """From counts [S, 2] over all context-parallel ranks: rows that are not finite, and dual-clipped rows.

    The authors' mean per micro-batch, weighted by sequences, is a sum too: Σ_mb n_mb·mean_mb = Σ over rows of n_mb / kept
    tokens of the micro-batch. What is kept is known on every context-parallel rank, so it needs no collective.
    """
    non_finite = counts[:, 0] > 0
    dropped = ~non_finite & (counts[:, 1] > 1) & objective.drops
    kept = ~(non_finite | dropped)
    length = rows.response_length
    # Dropped sequences count as sequences.
    reference_weight = (length > 0).sum() / (length * kept).sum().clamp(min=1)
    if objective.unit == "kept_sequences":
        weight = 1.0 / length.clamp(min=1)
    elif objective.unit == "kept_tokens":
        weight = torch.ones_like(length)
    else:
        weight = reference_weight.to(length.dtype).expand_as(length)
    return KeptSequences(non_finite, dropped, kept, weight, reference_weight)
