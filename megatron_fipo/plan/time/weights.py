"""Numbers of parameters by their place in the model. Cached, because a search asks for them thousands of times."""

from dataclasses import dataclass
from functools import lru_cache

from megatron_fipo.families.family import EMBEDDING_WEIGHT, Architecture, Family, Layers, Weight
from megatron_fipo.plan.case import Case
from megatron_fipo.plan.experts import layer_kind
from megatron_fipo.plan.layout import distinct_weights


@dataclass(frozen=True)
class ModelWeights:
    """Parameters of the complete model, without vocabulary padding."""

    dense: int
    """Of all layers outside experts."""
    expert: int
    """Of one expert of every layer that has experts."""
    embedding: int
    ends: int
    """Outside the layers, the embedding included."""


@lru_cache(maxsize=64)
def layer_matrices(family: Family, architecture: Architecture, kind: Layers) -> tuple[Weight, ...]:
    """The matrices of a layer of this kind, of its experts the first; all such layers have the same. Empty if none is of it."""
    layers = range(architecture.num_layers)
    layer = next((layer for layer in layers if layer_kind(architecture, layer) is kind), None)
    return tuple(
        weight
        for weight in distinct_weights(family, architecture)
        if weight.layer == layer and weight.is_layer_matrix
    )


def model_weights(case: Case) -> ModelWeights:
    return _model_weights(case.family, case.architecture)


@lru_cache(maxsize=64)
def _model_weights(family: Family, architecture: Architecture) -> ModelWeights:
    weights = distinct_weights(family, architecture)
    return ModelWeights(
        dense=sum(
            weight.parameters for weight in weights if weight.layer is not None and weight.expert is None
        ),
        expert=sum(weight.parameters for weight in weights if weight.expert is not None),
        embedding=sum(weight.parameters for weight in weights if weight.megatron == EMBEDDING_WEIGHT),
        ends=sum(weight.parameters for weight in weights if weight.layer is None),
    )
