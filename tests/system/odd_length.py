"""A reward for models with random weights: their responses get both scores, so that groups are informative."""

from megatron_fipo.tasks import Completion


def score(completion: Completion) -> float:
    return float(len(completion.text) % 2)
