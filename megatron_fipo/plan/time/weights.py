"""Numbers of parameters by their place in the model. Cached, because a search asks for them thousands of times."""

from dataclasses import dataclass
from functools import lru_cache

from megatron_fipo.families.family import EMBEDDING_WEIGHT, Architecture, Family, Weight
from megatron_fipo.plan.case import Case, Experts
from megatron_fipo.plan.layout import is_expert


@dataclass(frozen=True)
class ModelWeights:
    """Parameters of the complete model, without vocabulary padding."""

    dense: int
    """Of one layer outside its experts."""
    expert: int
    """Of one expert of a layer; 0 without experts."""
    embedding: int
    ends: int
    """Outside the layers, the embedding included."""


@lru_cache(maxsize=64)
def layer_matrices(family: Family, architecture: Architecture) -> tuple[Weight, ...]:
    """The matrices of a layer; all layers have the same."""
    return tuple(
        weight for weight in family.weights(architecture) if weight.layer == 0 and weight.is_layer_matrix
    )


def model_weights(case: Case) -> ModelWeights:
    return _model_weights(case.family, case.architecture, case.experts)


@lru_cache(maxsize=64)
def _model_weights(family: Family, architecture: Architecture, experts: Experts) -> ModelWeights:
    weights = [weight for weight in family.weights(architecture) if weight.layer in (None, 0)]
    expert = [weight for weight in weights if is_expert(weight, experts)]
    return ModelWeights(
        dense=sum(weight.parameters for weight in weights if weight.layer == 0)
        - sum(weight.parameters for weight in expert),
        expert=sum(weight.parameters for weight in expert),
        embedding=sum(weight.parameters for weight in weights if weight.megatron == EMBEDDING_WEIGHT),
        ends=sum(weight.parameters for weight in weights if weight.layer is None),
    )
