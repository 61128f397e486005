"""Which engines get weights when: a restarted engine that fails its push must not disturb the others."""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_fipo.config import Config, ModelConfig
from megatron_fipo.driver.rank_actor import TrainerLostError
from megatron_fipo.driver.rollout.engine_usage import EngineUsage
from megatron_fipo.driver.rollout.fleet import Fleet
from megatron_fipo.driver.rollout.group_source import (
    Interrupted,
    LiveGroups,
    ReplayGroups,
    RolloutCounts,
    StopUnsavedError,
    interrupting,
)
from megatron_fipo.driver.rollout.losses import PoolCounts
from megatron_fipo.driver.scoring.pool import ScorerCounts
from megatron_fipo.engine.protocol import EngineStatus
from megatron_fipo.errors import UserError
from megatron_fipo.trainer.protocol import PushFailure


class Trainer:
    """Its pushes fail at the engines in `refusing`; it records what it sent to which engines."""

    def __init__(self, *refusing: int) -> None:
        self.refusing = set(refusing)
        self.pushes: list[tuple[list[int], int, bool]] = []

    def push_weights(self, engines: dict[int, Any], version: int, check: bool) -> PushFailure | None:
        self.pushes.append((sorted(engines), version, check))
        return next((PushFailure(number, "died") for number in engines if number in self.refusing), None)


class Pool:
    """Weight versions by engine; a failed engine is starting until the next `loaded(wait=True)`."""

    starting = False
    outstanding = 0

    def __init__(self, versions: dict[int, int | None]) -> None:
        self.versions = versions
        self.lost: list[int] = []

    def loaded(self, wait: bool) -> dict[int, Any]:
        if wait:
            self.versions |= dict.fromkeys(self.lost)
            self.lost = []
        return {number: object() for number in self.versions if number not in self.lost}

    def stale(self) -> dict[int, Any]:
        return {
            number: engine
            for number, engine in self.loaded(wait=False).items()
            if self.versions[number] is None
        }

    def updated(self, numbers: Any, version: int) -> None:
        self.versions |= dict.fromkeys(numbers, version)

    def failed(self, number: int, reason: str) -> None:
        self.lost.append(number)

    def poll(self, timeout_s: float) -> list[Any]:
        return []


class Collector:
    """Has enough after `steps` steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.paused = False
        self.received_tokens = 0

    progress = "0 of 1 groups"

    @property
    def enough(self) -> bool:
        return self.steps == 0

    def resume(self, version: int) -> None: ...

    def step(self, timeout_s: float) -> None:
        self.steps -= 1

    def pause(self) -> None:
        self.paused = True

    def pop_batch(self) -> str:
        return "groups"


class Console:
    def phase(self, *_: Any, **__: Any) -> None: ...

    def progress(self, detail: str) -> None: ...


def rollouts(trainer: Any, pool: Pool, collector: Collector, **settings: Any) -> LiveGroups:
    config = Config(model=ModelConfig(path="m"), run_dir="r")
    config.rollout.placement = "separate"
    config.deterministic = settings.pop("deterministic", False)
    for name, value in settings.items():
        setattr(config.rollout, name, value)
    return LiveGroups(config, collector, pool, None, trainer, Console(), lambda: None)  # type: ignore[arg-type]


def test_a_push_to_a_restarted_engine_leaves_the_others_at_work():
    trainer, pool = Trainer(1), Pool({0: 3, 1: None})
    assert rollouts(trainer, pool, Collector(2)).groups(1, 3) == "groups"
    assert trainer.pushes == [([1], 3, True)]
    assert pool.versions[0] == 3


def test_new_weights_reach_the_engines_that_can_take_them():
    trainer, pool = Trainer(1), Pool({0: 3, 1: 3, 2: 3})
    rollouts(trainer, pool, Collector(0)).push_weights(4)
    assert [engines for engines, _, _ in trainer.pushes] == [[0, 1, 2], [0, 2]]
    assert (pool.versions[0], pool.versions[2]) == (4, 4)


def test_checksums_are_compared_every_so_many_pushes():
    trainer = Trainer()
    live = rollouts(trainer, Pool({0: None}), Collector(0), check_weight_sync=3)
    for version in range(7):
        live.push_weights(version)
    assert [check for _, _, check in trainer.pushes] == [True, False, False, True, False, False, True]


@pytest.mark.parametrize(
    ("error", "expected"),
    [(UserError("no engine"), Interrupted), (TrainerLostError("rank"), TrainerLostError)],
)
def test_only_a_run_whose_trainer_lives_is_saved(error, expected):
    class Broken(Trainer):
        def push_weights(self, *_: Any) -> PushFailure | None:
            raise error

    with pytest.raises(expected):
        rollouts(Broken(), Pool({0: None}), Collector(0)).push_weights(1)


@pytest.mark.parametrize("deterministic", [True, False])
def test_when_the_old_weights_are_gone_a_deterministic_run_stops_and_others_begin_anew(deterministic):
    collector = Collector(0)
    live = rollouts(Trainer(), Pool({0: None}), collector, mode="one_step_off", deterministic=deterministic)
    live.groups(1, 0)
    collector.steps = 5
    if deterministic:
        with pytest.raises(StopUnsavedError, match="last checkpoint"):
            live.after_update()
    else:
        live.after_update()
    assert collector.paused
    assert collector.steps == 5


@pytest.mark.parametrize(
    ("error", "expected", "undone"),
    [
        (UserError("no engine"), Interrupted, True),
        (Interrupted(), Interrupted, True),
        (TrainerLostError("rank"), TrainerLostError, False),
        (StopUnsavedError("weights"), StopUnsavedError, False),
        (RuntimeError("a bug"), RuntimeError, False),
    ],
)
def test_an_interruption_undoes_before_the_state_is_saved(error, expected, undone):
    calls: list[str] = []
    with pytest.raises(expected) as caught, interrupting(lambda: calls.append("undo")):
        raise error
    assert bool(calls) is undone
    assert caught.value.__cause__ is (error if type(error) is UserError else None)


class AbandonedPool(Pool):
    """Records what is called, and is asleep between `sleep` and `wake`."""

    def __init__(self) -> None:
        super().__init__({0: 0, 1: 0})
        self.calls: list[str] = []

    def sleep(self) -> None:
        self.calls.append("sleep")

    def wake(self) -> None:
        self.calls.append("wake")

    def abort(self) -> list[Any]:
        self.calls.append("abort")
        return []


class LostTrainer(Trainer):
    def push_weights(self, *_: Any) -> PushFailure | None:
        raise TrainerLostError("rank 0 died")


def abandoned(pool: AbandonedPool, trainer: Trainer, **settings: Any) -> LiveGroups:
    live = rollouts(trainer, pool, Collector(0), **settings)
    live.scorers = SimpleNamespace(abandon=lambda: pool.calls.append("scorers"))  # type: ignore[assignment]
    return live


def test_engines_that_sleep_during_an_update_are_woken_when_the_trainer_is_lost():
    pool = AbandonedPool()
    live = abandoned(pool, Trainer(), placement="colocated")
    live.groups(1, 0)
    live.abandon()
    assert pool.calls == ["sleep", "scorers", "abort", "wake"]


@pytest.mark.parametrize(("engine", "lost"), [("vllm", [0, 1]), ("local", [])])
def test_only_engines_that_may_wait_inside_nccl_are_started_again(engine, lost):
    pool = AbandonedPool()
    live = abandoned(pool, LostTrainer(), engine=engine)
    with pytest.raises(TrainerLostError):
        live.push_weights(1)
    live.abandon()
    assert pool.lost == lost
    calm = AbandonedPool()
    live = abandoned(calm, Trainer(), engine=engine)
    live.push_weights(1)
    live.abandon()
    assert calm.lost == []


class ProbedPool(Pool):
    """One engine, whose usage a real fleet measures; only `loaded(wait=True)` probes it."""

    def __init__(self) -> None:
        super().__init__({0: 0})
        self.now, self.generated = 0.0, 0
        self.fleet = Fleet(
            1,
            max_restarts=0,
            load_timeout_s=9.0,
            health_timeout_s=9.0,
            stall_timeout_s=9.0,
            loaded_version=0,
            now=0.0,
        )
        self.fleet.loaded(0, self.status, 0.0)

    @property
    def status(self) -> EngineStatus:
        return EngineStatus(0, tokens=self.generated, generated_tokens=self.generated)

    def loaded(self, wait: bool) -> dict[int, Any]:
        if wait:
            self.fleet.answered_probe(0, self.status, self.now)
        return super().loaded(wait)

    def take_usage(self) -> list[EngineUsage]:
        return self.fleet.take_usage(self.now)

    def work(self, seconds: float, tokens: int) -> None:
        """A call, and a second without one."""
        self.fleet.called(0, 1, self.now)
        self.now += seconds
        self.generated += tokens
        self.fleet.answered_call(0, 1, self.now)
        self.now += 1.0


def test_tokens_sampled_before_the_first_iteration_do_not_count_in_it():
    """Of the evaluation before training neither the tokens nor the time are part of the first iteration."""
    pool = ProbedPool()
    source = rollouts(Trainer(), pool, Collector(0))
    source.scorers = SimpleNamespace(take_seconds=lambda: 0.0)  # type: ignore[assignment]
    pool.work(seconds=5.0, tokens=1000)
    source.begin_usage()
    pool.work(seconds=3.0, tokens=240)
    source.push_weights(1)
    (usage,) = source.take_usage().engines
    assert usage.decode_tokens_per_s is not None
    assert usage.decode_tokens_per_s * (1 - usage.idle) * 4.0 == pytest.approx(240)


def test_counts_are_those_of_engines_and_scorers():
    class Counting:
        def __init__(self, counts: Any) -> None:
            self.take_counts = lambda: counts

    engines, scorers = PoolCounts(restarts=1), ScorerCounts(retries=2)
    live = rollouts(Trainer(), Counting(engines), Collector(0))  # type: ignore[arg-type]
    live.scorers = Counting(scorers)  # type: ignore[assignment]
    assert live.take_counts() == RolloutCounts(engines, scorers)
    assert ReplayGroups(None).take_counts() == RolloutCounts()  # type: ignore[arg-type]


def test_only_live_groups_can_generate():
    assert rollouts(Trainer(), Pool({0: 1}), Collector(0)).live
    replay = ReplayGroups(None)  # type: ignore[arg-type]
    assert not replay.live
    with pytest.raises(RuntimeError, match="no engines"):
        replay.generate([], 0)
    with pytest.raises(RuntimeError, match="no scorers"):
        replay.score([])
