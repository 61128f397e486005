"""Requests to a scorer for tests."""

from collections.abc import Sequence

import numpy as np

from megatron_fipo.scorer.protocol import FinishedResponse, ScoreRequest
from megatron_fipo.tasks.task import Problem, TaskSettings


def request(
    key: int, responses: int | Sequence[Sequence[int]] = 1, truth: str = "1,2=3", reward: str = "faulty"
) -> ScoreRequest:
    """A request with so many responses of one token, or with these token ids."""
    ids = [[3]] * responses if isinstance(responses, int) else responses
    return ScoreRequest(
        key,
        Problem(f"p{key}", (1,), "prompt", truth, "test", task=TaskSettings(reward=reward)),
        tuple(FinishedResponse(np.array(tokens, np.int32), "stop") for tokens in ids),
    )
