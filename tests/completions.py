"""Completions for tests of reward functions."""

import numpy as np

from megatron_fipo.tasks.task import Completion, Problem, RewardFunction, Score


def completion(text: str, problem: Problem, finish_reason: str = "stop") -> Completion:
    """A response of this text, without token ids."""
    return Completion(problem, text, np.empty(0, np.int32), finish_reason)


def scored(score: RewardFunction | None, text: str, problem: Problem, finish_reason: str = "stop") -> Score:
    """The score that a built-in reward function gives a text."""
    assert score is not None
    result = score(completion(text, problem, finish_reason))
    assert isinstance(result, Score)
    return result
