"""Rewards as a user writes them."""

import importlib.util
import os
import time
from collections.abc import Sequence

from megatron_fipo.tasks import Completion, Reward, Score


def score(completion: Completion) -> Score:
    """Right if the response has the ground truth, with numbers."""
    right = float(completion.problem.ground_truth in completion.text)
    return Score(
        right, right, completion.text, {"length": len(completion.text), "note": "text", "flag": True}
    )


def length(completion: Completion) -> float:
    return len(completion.text) / 4


def _rank(completions: Sequence[Completion]) -> list[float]:
    order = sorted(len(completion.text) for completion in completions)
    return [float(order.index(len(completion.text))) for completion in completions]


rank = Reward(None, score_group=_rank)


def fails(completion: Completion) -> float:
    return {}["missing"]


def unnamed(completion: Completion) -> Score:
    return Score(0.0, 0.0, extra={"a b": 1.0})


def reserved(completion: Completion) -> Score:
    return Score(0.0, 0.0, extra={"mean": 1.0})


def ends(completion: Completion) -> float:
    os._exit(3)


def lasts(completion: Completion) -> float:
    time.sleep(60)
    return 1.0


def finds_torch(completion: Completion) -> float:
    return float(importlib.util.find_spec("torch") is not None)
