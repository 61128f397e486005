"""Environment workers as real processes: a turn that fails, hangs or kills its process costs its own episode."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_fipo.driver.rollout.environments import EnvironmentPool, TurnsResult
from megatron_fipo.driver.workers import queue
from megatron_fipo.environments.actor import EnvironmentActor
from megatron_fipo.environments.protocol import TurnAnswer
from megatron_fipo.errors import UserError
from tests.environments.faulty import SETTINGS, turn


@pytest.fixture
def pool(cluster: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[EnvironmentPool]:
    monkeypatch.setattr(queue, "GRACE_S", 2.0)
    logged: list[str] = []
    made = EnvironmentPool(EnvironmentActor, SETTINGS, 2, max_failure_share=1.0, log=logged.append)
    made.wait_until_loaded()
    yield made
    made.shutdown()


def answered(results: list[TurnsResult]) -> dict[str, bool]:
    """Whether the turn of each episode has an answer."""
    return {
        turn.episode_id: isinstance(answer, TurnAnswer)
        for result in results
        for turn, answer in zip(result.request.turns, result.answers or (None,), strict=True)
    }


def test_a_turn_that_kills_its_worker_fails_alone_after_a_second_try(pool, tmp_path: Path):
    always = ["raise", "slow", "hang"]
    once = f"die@{tmp_path / 'die'}"
    turns = [turn(name, episode_id=name) for name in ["good", *always, once, "ids", "done"]]
    pool.submit_turns(turns)
    assert answered(pool.finish()) == {t.episode_id: t.episode_id not in always for t in turns}
    assert pool.outstanding == 0


def test_an_environment_that_cannot_be_used_is_refused_before_the_run(cluster):
    path = "tests.environments.faulty:raises_on_nothing"
    settings = replace(SETTINGS, samples={path: turn().problem})
    pool = EnvironmentPool(EnvironmentActor, settings, 1, max_failure_share=1.0, log=print)
    with pytest.raises(UserError, match="tried with an empty response to problem p7, it raised IndexError"):
        pool.wait_until_loaded()
    pool.shutdown()
