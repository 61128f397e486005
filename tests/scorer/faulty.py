"""A scorer whose reward function misbehaves as the ground truth of its problem names."""

import contextlib
import itertools
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_fipo.scorer.actor import ScorerActor
from megatron_fipo.scorer.protocol import ScorerSettings
from megatron_fipo.tasks.registry import REWARDS
from megatron_fipo.tasks.task import Problem, Reward, Score

ROOT = Path(__file__).parents[2]
SETTINGS = ScorerSettings(
    model_path=str(ROOT / "examples/countdown/base-model"),
    trust_remote_code=False,
    reward_name="faulty",
    timeout_s=0.5,
    memory_mb=300,
)
GOOD = Score(1.0, 1.0, "3", {"steps": [1, 2]})


def swallow() -> Score:
    """Catches everything, as `except:` does."""
    until = time.monotonic() + 1.2
    while time.monotonic() < until:
        with contextlib.suppress(BaseException):
            time.sleep(0.1)
    return GOOD


def allocate() -> Score:
    return replace(GOOD, extra={"size": len(bytearray(10**9))})


BEHAVIOURS: dict[str, Callable[[], Any]] = {
    "good": lambda: GOOD,
    "whole numbers": lambda: Score(-1, 0, ""),  # type: ignore[arg-type]
    "fraction": lambda: replace(GOOD, accuracy=0.5),
    "nan": lambda: replace(GOOD, reward=float("nan")),
    "infinite": lambda: replace(GOOD, reward=float("inf")),
    "text": lambda: replace(GOOD, reward="1.0"),
    "boolean": lambda: replace(GOOD, accuracy=True),
    "no answer": lambda: replace(GOOD, answer=None),
    "half a character": lambda: replace(GOOD, answer="\ud83d"),
    "no JSON": lambda: replace(GOOD, extra={"value": object()}),
    "nan in extra": lambda: replace(GOOD, extra={"value": float("nan")}),
    "none": lambda: None,
    "number": lambda: 1.0,
    "raise": lambda: {}["missing"],
    "exit": lambda: sys.exit(3),
    "slow": lambda: time.sleep(60),
    "loop": lambda: all(True for _ in itertools.count()),
    "swallow": swallow,
    "memory": allocate,
    "hang": lambda: sum(itertools.repeat(1)),  # compiled code that no signal interrupts
    "die": lambda: os._exit(1),
}


def score(response_text: str, problem: Problem, finish_reason: str) -> Score:
    """The ground truth names what every response does. A path in it: only while there is no file there."""
    behaviour, _, once = problem.ground_truth.partition("@")
    if once:
        if Path(once).exists():
            return GOOD
        Path(once).touch()
    return BEHAVIOURS[behaviour]()


class FaultyScorer(ScorerActor):
    """A real scorer with this reward."""

    def ready(self) -> None:
        REWARDS["faulty"] = Reward(score, lambda _: None)
        super().ready()


class Unloadable(ScorerActor):
    """Ends while it loads."""

    def ready(self) -> None:
        os._exit(1)
