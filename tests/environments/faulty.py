"""Environments that misbehave as the ground truth of their problem names, and turns for them."""

import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_fipo.environments.protocol import TurnRequest, TurnsRequest, WorkerSettings
from megatron_fipo.tasks.environment import Done, Episode
from megatron_fipo.tasks.task import Problem, Score, TaskSettings, UnavailableError
from tests.scorer.faulty import ROOT, allocate, swallow

FAULTY, COUNTER = "tests.environments.faulty:step", "tests.environments.faulty:Counter"


def problem(truth: str = "good", environment: str = FAULTY) -> Problem:
    return Problem("p7", (1,), "prompt", truth, "test", task=TaskSettings(environment=environment))


SETTINGS = WorkerSettings(
    model_path=str(ROOT / "examples/countdown/base-model"),
    trust_remote_code=False,
    samples={FAULTY: problem(), COUNTER: problem(environment=COUNTER)},
    hook_folder=str(ROOT),
    max_observation_tokens=6,
    timeout_s=0.5,
    memory_mb=300,
)


def throw(error: BaseException) -> Any:
    raise error


BEHAVIOURS: dict[str, Any] = {
    "good": lambda: "12",
    "ids": lambda: [5, 6, 7],
    "long": lambda: "123456789",
    "done": lambda: None,
    "score": lambda: Done(0.5),
    "full score": lambda: Done(Score(1.0, 0.0, "a")),
    "nan": lambda: Done(float("nan")),
    "empty": lambda: "",
    "number": lambda: 3,
    "large id": lambda: [5, 99],
    "messages": lambda: [{"role": "user", "content": "1"}],
    "message without role": lambda: [{"content": "1"}],
    "half a character": lambda: "\ud83d",
    "raise": lambda: {}["missing"],
    "unavailable": lambda: throw(UnavailableError("the tool is away")),
    "exit": lambda: sys.exit(3),
    "slow": lambda: time.sleep(60),
    "swallow": swallow,
    "memory": allocate,
    "hang": lambda: sum(itertools.repeat(1)),
    "die": lambda: os._exit(1),
}


def step(episode: Episode) -> Any:
    """A path in the ground truth: only while there is no file there. The try at the start has an empty response."""
    behaviour, _, once = episode.problem.ground_truth.partition("@")
    if once:
        if Path(once).exists():
            return "12"
        Path(once).touch()
    return BEHAVIOURS[behaviour]()


class Counter:
    """Answers with the number of its turn, and of those that it saw in this process. Ends after 5."""

    calls = 0

    def reset(self, problem: Problem) -> None:
        self.turn = 0

    def step(self, episode: Episode) -> str | None:
        self.turn += 1
        Counter.calls += 1
        assert self.turn == len(episode.turns)
        assert [turn.observation for turn in episode.turns] == [str(n) for n in range(1, self.turn)] + [""]
        return str(self.turn) if self.turn < 5 else None


class Nameless:
    """No environment: it has no `step`."""

    def reset(self, problem: Problem) -> None: ...


async def waits(episode: Episode) -> str:
    return ""


class AsyncStep(Nameless):
    async def step(self, episode: Episode) -> str:
        return ""


def yields(episode: Episode) -> Iterator[str]:
    yield ""


class WantsSize(Nameless):
    def __init__(self, size: int) -> None: ...

    def step(self, episode: Episode) -> str:
        return ""


def two_arguments(episode: Episode, other: int) -> str:
    return ""


def raises_on_nothing(episode: Episode) -> str:
    return episode.response[0]


def turn(
    truth: str = "good",
    turns: Sequence[tuple[str, str]] = (("3", ""),),
    episode_id: str = "e",
    environment: str = FAULTY,
    space: int = 100,
) -> TurnRequest:
    """A turn of an episode with these turns (response, observation), whose characters are tokens."""
    from megatron_fipo.tasks.countdown.tokenizer import CHARACTERS

    ids: list[int] = []
    observations = []
    for response, observation in turns:
        ids += [3 + CHARACTERS.index(character) for character in response]
        if observation:
            observations.append((len(ids), len(ids) + len(observation)))
            ids += [3 + CHARACTERS.index(character) for character in observation]
    return TurnRequest(
        episode_id, problem(truth, environment), np.array(ids, np.int32), tuple(observations), space
    )


def request(*turns: TurnRequest) -> TurnsRequest:
    return TurnsRequest(0, turns, 0, 1)
