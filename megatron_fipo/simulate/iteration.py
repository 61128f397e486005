"""Iterations of a run with the driver's own source of groups, over simulated engines, a simulated trainer and a clock.

The order of calls is that of `driver.loop.Loop`: groups, update, `after_update`, push, and evaluations between iterations.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from megatron_fipo.config import Config
from megatron_fipo.driver.all_wrong import AllWrongWatch
from megatron_fipo.driver.iteration_metrics import staleness_values
from megatron_fipo.driver.rollout.collect_counts import CollectCounts
from megatron_fipo.driver.rollout.collector import Collected, Collector
from megatron_fipo.driver.rollout.group_source import Interrupted, LiveGroups
from megatron_fipo.driver.rollout.prompt_group import GroupRequest
from megatron_fipo.driver.rollout.trajectories import Overlong
from megatron_fipo.engine.protocol import GenerationRequest, SamplingParams
from megatron_fipo.simulate.pool import Clock, SimulatedPool, SimulatedScorers, Usage
from megatron_fipo.simulate.responses import Responses, problems
from megatron_fipo.simulate.times import Times
from megatron_fipo.tasks.dataset import Dataset

SCORE, UPDATE, SYNC = "old log-probs", "update", "weight sync"


@dataclass(frozen=True)
class Scenario:
    """What is simulated."""

    config: Config
    times: Times
    responses: Responses


@dataclass(frozen=True)
class Phase:
    """What the trainer did; between phases it waits for groups."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Iteration:
    """One iteration. Times in seconds of the clock, tokens in tokens."""

    start: float
    end: float
    phases: tuple[Phase, ...]
    counts: CollectCounts
    responses: int
    """Trained on."""
    response_tokens: int
    """Of these."""
    mean_length: float
    staleness: dict[str, float]
    """`iteration_metrics.staleness_values`."""
    received_tokens: int
    """Response tokens that engines gave in this time, for this batch or a later one."""
    usage: Usage

    @property
    def seconds(self) -> float:
        return self.end - self.start

    def phase_seconds(self, *names: str) -> float:
        return sum(phase.end - phase.start for phase in self.phases if phase.name in names)


class _Console:
    """A console that shows nothing."""

    def phase(self, *_: Any, **__: Any) -> None: ...

    def progress(self, detail: str) -> None: ...


class _Trainer:
    """The ranks: they pass time."""

    def __init__(self, scenario: Scenario, clock: Clock) -> None:
        self.phases: list[Phase] = []
        self._scenario = scenario
        self._clock = clock

    def train(self, collected: Collected, meanwhile: Callable[[], None] | None) -> None:
        """As `RLTrainer.train_iteration`. A batch of fewer groups takes proportionally less."""
        times, batch = self._scenario.times, self._scenario.config.batch
        share = len(collected.groups) / batch.prompts_per_iteration
        length = _mean_length(collected)
        for name, seconds in ((SCORE, times.score(length)), (UPDATE, times.update(length))):
            self._clock.horizon = self._clock.now + share * seconds
            start = self._clock.now
            while meanwhile is not None and self._clock.now < self._clock.horizon:
                meanwhile()
            self._clock.now, self._clock.horizon = self._clock.horizon, math.inf
            self.phases.append(Phase(name, start, self._clock.now))

    def push_weights(self, engines: dict[int, Any], version: int, check: bool) -> None:
        """As `RLTrainer.push_weights`: no push fails."""
        start = self._clock.now
        self._clock.advance(self._scenario.times.sync)
        self.phases.append(Phase(SYNC, start, self._clock.now))


class Simulation:
    """A run from its start, iteration by iteration."""

    def __init__(self, scenario: Scenario, failures: Iterable[tuple[float, int]] = ()) -> None:
        """`failures`: when which engine fails, in seconds after the start."""
        # LiveGroups samples nothing during the last iteration; no iteration here is the last.
        config = replace(scenario.config, iterations=10**9)
        self.scenario = scenario
        self.clock = Clock()
        self.pool = SimulatedPool(
            config.rollout,
            scenario.times,
            scenario.responses,
            self.clock,
            keep_batches=config.deterministic,
            failures=failures,
        )
        scorers, rollout = SimulatedScorers(scenario.responses), config.rollout
        self.collector = Collector(
            Dataset(problems(scenario.responses.prompt_tokens), config.seed),
            self.pool,
            scorers,
            AllWrongWatch(lambda ids: "", lambda sentence: None),
            rollout,
            Overlong(rollout.max_response_length, buffer=0, factor=0.0),
            target_groups=config.batch.prompts_per_iteration,
            responses_per_prompt=config.batch.responses_per_prompt,
            seed=config.seed,
        )
        self._trainer = _Trainer(scenario, self.clock)
        parts: tuple[Any, ...] = (self.collector, self.pool, scorers, self._trainer, _Console(), lambda: None)
        self._groups = LiveGroups(config, *parts)
        self._version = 0
        self._groups.push_weights(0)
        self._begin()

    def iterate(self) -> Iteration:
        """The next iteration, from the first request to the end of the weight push.

        UserError if the run would stop: no engine is left, or `rollout.max_prompts` prompts gave nothing to train on.
        """
        start = self.clock.now
        with _reasons():
            collected = self._groups.groups(self._version + 1, self._version)
            self._trainer.train(collected, self._groups.during_update())
            self._groups.after_update()
            self._version += 1
            self._groups.push_weights(self._version)
        trained = [trajectory for group in collected.groups for trajectory in group]
        tokens = sum(trajectory.response_length for trajectory in trained)
        received = self.collector.received_tokens
        phases, usage = self._begin()
        return Iteration(
            start=start,
            end=self.clock.now,
            phases=phases,
            counts=collected.counts,
            responses=len(trained),
            response_tokens=tokens,
            mean_length=tokens / len(trained),
            staleness=staleness_values(trained, self._version - 1),
            received_tokens=received,
            usage=usage,
        )

    def evaluate(self, samples: Sequence[int]) -> float:
        """Seconds of one evaluation with so many responses to each held-out problem; they are problems of training."""
        start, evaluation = self.clock.now, self.scenario.config.evaluation
        rollout = self.scenario.config.rollout
        sampling = SamplingParams.of(evaluation, rollout.max_response_length, rollout.stop)
        held_out = itertools.cycle(problems(self.scenario.responses.prompt_tokens))
        groups = []
        for index, (k, problem) in enumerate(zip(samples, held_out, strict=False)):
            requests = [
                GenerationRequest(
                    f"evaluation-{index}/{sample}", problem.prompt_ids, seed=index * 7_919 + sample * 104_729
                )
                for sample in range(k)
            ]
            groups.append(GroupRequest(problem, requests, sampling))
        with _reasons():
            self._groups.generate(groups, self._version)
        self._begin()
        return self.clock.now - start

    def _begin(self) -> tuple[tuple[Phase, ...], Usage]:
        """What trainer and engines did; their counts begin again."""
        phases, self._trainer.phases = tuple(self._trainer.phases), []
        self.collector.received_tokens = 0
        return phases, self.pool.take_engine_usage()


@contextmanager
def _reasons() -> Iterator[None]:
    """Raise the reason for which the driver would save its state and stop."""
    try:
        yield
    except Interrupted as stop:
        raise stop.__cause__ or stop from None


def _mean_length(collected: Collected) -> float:
    lengths = [trajectory.response_length for group in collected.groups for trajectory in group]
    return sum(lengths) / len(lengths)
