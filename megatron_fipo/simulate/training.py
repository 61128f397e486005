"""A complete run: some of its iterations simulated request by request, the others between them, and what fails on the way.

A large iteration has tens of thousands of responses. So windows of consecutive iterations are simulated at points of training,
as many as `RESPONSES` allows; times of the iterations between are interpolated. Evaluations, checkpoints and failures are then
played through all iterations, failures `DRAWS` times. `tests/simulate/test_windows.py` compares this with all iterations
simulated.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from megatron_fipo.plan.case import Case
from megatron_fipo.simulate.iteration import SCORE, UPDATE, Iteration, Scenario, Simulation
from megatron_fipo.simulate.operation import Operation
from megatron_fipo.simulate.playing import Costs, Played, play
from megatron_fipo.simulate.responses import Responses
from megatron_fipo.simulate.times import Times

RESPONSES = 200_000
"""Responses to simulate request by request for one run: some 20 seconds."""
POINTS = (0.0, 1 / 3, 2 / 3, 1.0)
"""Of training, for windows of a run whose responses grow. One in the middle is enough for others."""
DRAWS = 200
"""Times that the failures of a run are drawn."""

TimesOf = Callable[[Case, str], Times]
"""The times of a case at the low end, the value or the high end of their intervals."""


@dataclass(frozen=True)
class Window:
    """Consecutive iterations at one point of training."""

    progress: float
    """0 is the start of training, 1 its end."""
    iterations: tuple[Iteration, ...]
    evaluation_s: float
    """Of one evaluation."""
    engines: int
    prompt_tokens: float

    def mean(self, value: Callable[[Iteration], float]) -> float:
        """Over the iterations."""
        return sum(map(value, self.iterations)) / len(self.iterations)

    @cached_property
    def seconds(self) -> float:
        """Of one iteration."""
        return self.mean(lambda iteration: iteration.seconds)

    @property
    def trainer_idle(self) -> float:
        """Share of the time in which the trainer computes neither log-probs nor updates."""
        return 1 - self.mean(lambda iteration: iteration.phase_seconds(SCORE, UPDATE)) / self.seconds

    @property
    def engine_idle(self) -> float:
        """Share of the engines' time without a request."""
        return 1 - self.mean(lambda iteration: iteration.usage.busy_s) / self.engines / self.seconds

    @property
    def running(self) -> float:
        """Sequences that an engine with a request decodes."""
        busy = self.mean(lambda iteration: iteration.usage.busy_s)
        return self.mean(lambda iteration: iteration.usage.sequence_s) / busy if busy else 0.0

    @property
    def mean_length(self) -> float:
        """Of the responses trained on."""
        return self.mean(lambda iteration: iteration.mean_length)

    @property
    def generated_tokens(self) -> float:
        """Response tokens that engines give per iteration."""
        return self.mean(lambda iteration: iteration.received_tokens)

    @property
    def trained_tokens(self) -> float:
        """Tokens of prompts and responses per iteration."""
        return self.mean(
            lambda iteration: iteration.response_tokens + iteration.responses * self.prompt_tokens
        )

    @property
    def dropped(self) -> float:
        """Share of the sampled tokens that are thrown away: of stale, failed or superfluous groups."""
        dropped = self.mean(lambda iteration: iteration.counts.dropped_tokens)
        return dropped / self.mean(lambda iteration: iteration.counts.generated_tokens)

    def staleness(self, name: str) -> float:
        """A value of `iteration_metrics.staleness_values`."""
        return self.mean(lambda iteration: iteration.staleness[f"staleness/{name}"])


@dataclass(frozen=True)
class Training:
    """A simulated run."""

    case: Case
    windows: tuple[Window, ...]
    played: tuple[Played, ...]
    """One per draw of the failures."""
    low: float
    """Iterations at the low end of all times, relative to those at their values; `high` likewise."""
    high: float

    def over_run(self, value: Callable[[Window], float]) -> float:
        """The mean of a value over the iterations of the run."""
        return float(np.mean(_between(self.windows, self.case.config.iterations, value)))

    def per_second(self, value: Callable[[Window], float]) -> float:
        """The rate of an amount per iteration, over the wall time and per device."""
        return self.over_run(value) * self.case.config.iterations / self.wall / self.case.devices

    @cached_property
    def wall(self) -> float:
        """Seconds of the run, mean over the draws."""
        return float(np.mean([played.wall for played in self.played]))

    @property
    def wall_range(self) -> tuple[float, float]:
        """Its 5 % and 95 % quantiles over the draws, at the low and at the high end of the times."""
        fast, slow = np.quantile([played.wall for played in self.played], [0.05, 0.95])
        return float(fast) * self.low, float(slow) * self.high

    def lost(self) -> dict[str, float]:
        """Seconds by cause, mean over the draws."""
        return {
            cause: float(np.mean([played.seconds[cause] for played in self.played]))
            for cause in self.played[0].seconds
        }

    def counts(self) -> dict[str, float]:
        """Events by kind, mean over the draws."""
        return {
            kind: float(np.mean([played.counts[kind] for played in self.played]))
            for kind in self.played[0].counts
        }

    @property
    def sampling_error(self) -> float | None:
        """Relative standard error of the iteration time, from its variation within the windows; None if they have one each."""
        if len(self.windows[0].iterations) == 1:
            return None
        variances = [
            np.var([i.seconds for i in window.iterations], ddof=1) / len(window.iterations)
            for window in self.windows
        ]
        seconds = sum(window.seconds for window in self.windows)
        return math.sqrt(sum(variances)) / seconds


def simulate_training(
    case: Case, operation: Operation, times_of: TimesOf, responses: int = RESPONSES
) -> Training:
    """Simulate the run of a case. UserError if an engine cannot hold a response, or if losses are too frequent.

    `responses`: how many to simulate request by request; one iteration per window is the least.
    """
    grows = case.workload(0.0) != case.workload(1.0)
    points, times = POINTS if grows else (0.5,), times_of(case, "value")
    measured = measured_iterations(case, len(points), responses)
    windows = tuple(simulate_window(case, times, progress, measured) for progress in points)
    middle = windows[len(windows) // 2]
    low, high = (_relative(case, times_of(case, bound), middle) for bound in ("low", "high"))
    engine_loss_s = engine_loss_seconds(case, times, middle) if case.config.rollout.num_engines > 1 else 0.0
    return Training(case, windows, play_all(case, operation, times, windows, engine_loss_s), low, high)


def simulate_window(case: Case, times: Times, progress: float, measured: int) -> Window:
    """`measured` iterations at a point of training and an evaluation, after the iterations in which engines fill up."""
    simulation, iterations = simulate_iterations(case, times, progress, measured)
    return Window(
        progress,
        iterations,
        simulation.evaluate(case.held_out_samples),
        case.config.rollout.num_engines,
        case.workload().prompt_tokens,
    )


def simulate_iterations(
    case: Case, times: Times, progress: float, measured: int, failures: Sequence[tuple[float, int]] = ()
) -> tuple[Simulation, tuple[Iteration, ...]]:
    """The iterations of a window, and their simulation. `failures` as those of `Simulation`."""
    simulation = Simulation(scenario_of(case, times, progress), failures)
    for _ in range(_warm_up(case)):
        simulation.iterate()
    return simulation, tuple(simulation.iterate() for _ in range(measured))


def scenario_of(case: Case, times: Times, progress: float) -> Scenario:
    """The scenario at a point of training, with a seed of its own: errors of the windows are independent."""
    config = replace(case.config, seed=case.config.seed + round(1000 * progress))
    return Scenario(config, times, Responses.of(case.workload(progress), case.assumptions))


def measured_iterations(case: Case, windows: int, responses: int) -> int:
    """Iterations per window for a total of about `responses` responses, warm-up included; at least one."""
    per_window = responses / case.workload().sampled / windows
    return max(1, min(round(per_window) - _warm_up(case), math.ceil(case.config.iterations / windows)))


def _warm_up(case: Case) -> int:
    """Iterations until buffers and engines are as in all later ones: none carries anything over in synchronous `drop`."""
    rollout = case.config.rollout
    if rollout.unfinished == "drop":
        return 0 if rollout.mode == "synchronous" else 1
    return 2


def _relative(case: Case, times: Times, middle: Window) -> float:
    """The time of the window's first iteration with other times, relative to its own."""
    _, (other,) = simulate_iterations(case, times, middle.progress, 1)
    return other.seconds / middle.iterations[0].seconds


def _between(windows: tuple[Window, ...], iterations: int, value: Callable[[Window], float]) -> np.ndarray:
    """[iterations] linear interpolation of a value over the run."""
    position = np.linspace(0, 1, iterations)
    return np.interp(position, [window.progress for window in windows], [value(window) for window in windows])


def play_all(
    case: Case, operation: Operation, times: Times, windows: tuple[Window, ...], engine_loss_s: float
) -> tuple[Played, ...]:
    """Play the run through `DRAWS` times. `engine_loss_s` as that of `Costs`."""
    engine_gpus = (
        0 if case.colocated else case.engine_devices
    )  # else they are the trainer's, and lost with it
    costs = Costs(
        save_s=times.save,
        trainer_losses_per_s=(case.devices - engine_gpus) / operation.gpu_mtbf_hours / 3600,
        trainer_restart_s=operation.trainer_restart_s,
        engine_losses_per_s=engine_gpus / operation.gpu_mtbf_hours / 3600,
        engine_loss_s=engine_loss_s,
    )
    iteration_s = _between(windows, case.config.iterations, lambda window: window.seconds)
    evaluation_s = _between(windows, case.config.iterations, lambda window: window.evaluation_s)
    return tuple(play(iteration_s, evaluation_s, case.config, costs, seed) for seed in range(DRAWS))


def engine_loss_seconds(case: Case, times: Times, clean: Window) -> float:
    """Seconds by which the loss of an engine in the middle of an iteration delays it: the iteration once more, with a loss."""
    first = clean.iterations[0]
    _, (failing,) = simulate_iterations(case, times, clean.progress, 1, [((first.start + first.end) / 2, 0)])
    return max(0.0, failing.end - first.end)
