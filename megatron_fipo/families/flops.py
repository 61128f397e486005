"""Floating-point operations of a decoder: what MFU (model FLOPs utilization) counts. Pure arithmetic.

A multiplication and an addition are 2 operations. Counted are matrix products and attention; the backward pass is twice
the forward pass. Not counted are recomputed activations, padding, norms, rotations and the softmax: MFU is about the
model's work, whatever it cost.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_fipo.families.family import Architecture, Family


@dataclass(frozen=True)
class ModelFlops:
    """Operations of one forward pass."""

    per_token: int
    """Matrices of all layers; of experts those that process a token."""
    per_pair: int
    """Scores and weighted values of all layers and heads, for each pair of a query and a key that it sees."""
    per_row: int
    """The output layer, computed where the next token is a response token."""

    def forward(self, lengths: Sequence[int], rows: int) -> float:
        """Of sequences of these lengths with `rows` response tokens in all. Causal attention: L²/2 pairs each."""
        pairs = sum(length * length for length in lengths) / 2
        return self.per_token * sum(lengths) + self.per_pair * pairs + self.per_row * rows


def model_flops(family: Family, architecture: Architecture) -> ModelFlops:
    """Of the complete model, without vocabulary padding."""
    matrices = experts = 0
    for weight in family.weights(architecture):
        if weight.expert is not None:
            experts += weight.parameters
        elif weight.is_layer_matrix:
            matrices += weight.parameters
    if architecture.experts:
        matrices += experts * architecture.experts.per_token // architecture.experts.count
    return ModelFlops(
        per_token=2 * matrices,
        per_pair=4 * architecture.num_layers * architecture.size("query"),
        per_row=2 * architecture.size("vocab") * architecture.size("hidden"),
    )
