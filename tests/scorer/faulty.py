"""A scorer whose reward function misbehaves as the ground truth of its problem names."""

import contextlib
import itertools
import os
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_fipo.config import RewardConfig
from megatron_fipo.scorer.actor import ScorerActor
from megatron_fipo.scorer.protocol import ScorerSettings
from megatron_fipo.scorer.result import MAX_CHARACTERS, MAX_NESTING
from megatron_fipo.tasks.rewards import REWARDS
from megatron_fipo.tasks.task import Completion, Reward, Score, UnavailableError

ROOT = Path(__file__).parents[2]
SETTINGS = ScorerSettings(
    model_path=str(ROOT / "examples/countdown/base-model"),
    trust_remote_code=False,
    rewards=("faulty",),
    hook_folder=str(ROOT),
    reward=RewardConfig(timeout_s=0.5, memory_mb=300),
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


class Unreadable(Exception):
    """Its message cannot be read."""

    def __str__(self) -> str:
        raise ValueError


class UnreadableScore(Score):
    """A value of it cannot be read."""

    def __getattribute__(self, name: str) -> Any:
        if name == "reward":
            raise ValueError("no reward")
        return super().__getattribute__(name)


def throw(error: BaseException) -> Callable[[], Score]:
    def throw() -> Score:
        raise error

    return throw


def own_timer() -> Score:
    """Uses the signal with which its time is limited."""
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    until = time.monotonic() + 0.6
    while time.monotonic() < until:
        time.sleep(0.1)
    return GOOD


def nested(depth: int) -> dict[str, Any]:
    value: Any = {}
    for _ in range(depth - 2):
        value = [value]
    return {"value": value}


calls = itertools.count()


BEHAVIOURS: dict[str, Callable[[], Any]] = {
    "good": lambda: GOOD,
    "whole numbers": lambda: Score(-1, 0, ""),  # type: ignore[arg-type]
    "types like float and dict": lambda: Score(
        np.float64(-1), np.float64(0), "", OrderedDict(a=np.float64(1))
    ),
    "nested": lambda: replace(GOOD, extra=nested(MAX_NESTING)),
    "nested too deep": lambda: replace(GOOD, extra=nested(400)),
    "nested far too deep": lambda: replace(GOOD, extra=nested(10**5)),
    "too long": lambda: replace(GOOD, extra={"value": "x" * MAX_CHARACTERS}),
    "huge number": lambda: replace(GOOD, reward=10**400),
    "type like str": lambda: replace(GOOD, answer=np.str_("3")),
    "unreadable score": lambda: UnreadableScore(1.0, 1.0, "3"),
    "unreadable error": throw(Unreadable()),
    "long error": throw(ValueError("\ud83d" + "x" * 10**6)),
    "interrupt": throw(KeyboardInterrupt()),
    "base exception": throw(BaseException("reason")),
    "own timer": own_timer,
    "fork": lambda: replace(GOOD, extra={"child": os.fork()}),
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
    "number": lambda: 0.25,
    "negative number": lambda: -1,
    "true": lambda: True,
    "infinity": lambda: float("inf"),
    "unavailable": throw(UnavailableError("the judge is away")),
    "raise": lambda: {}["missing"],
    "raise at every second call": lambda: {}["missing"] if next(calls) % 2 else GOOD,
    "exit": lambda: sys.exit(3),
    "slow": lambda: time.sleep(60),
    "loop": lambda: all(True for _ in itertools.count()),
    "swallow": swallow,
    "memory": allocate,
    "hang": lambda: sum(itertools.repeat(1)),  # compiled code that no signal interrupts
    "die": lambda: os._exit(1),
}


def score(completion: Completion) -> Score:
    """The ground truth names what every response does. A path in it: only while there is no file there."""
    behaviour, _, once = completion.problem.ground_truth.partition("@")
    if once:
        if Path(once).exists():
            return GOOD
        Path(once).touch()
    return BEHAVIOURS[behaviour]()


class FaultyScorer(ScorerActor):
    """A real scorer with this reward."""

    def ready(self) -> None:
        REWARDS["faulty"] = lambda _: Reward(score)
        super().ready()


class Unloadable(ScorerActor):
    """Ends while it loads."""

    def ready(self) -> None:
        os._exit(1)
