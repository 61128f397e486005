"""A run played through: its iterations one after another, with evaluations, checkpoints and drawn failures."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_fipo.config import Config
from megatron_fipo.errors import UserError

ITERATIONS, EVALUATIONS, CHECKPOINTS = "iterations", "evaluations", "checkpoints"
REPEATED, RESTARTS, ENGINES = "repeated iterations", "trainer restarts", "lost engines"
HOPELESS = 5.0
"""Losses expected between two checkpoints above which a run is refused: it would get there once in e^5 = 150 attempts."""


@dataclass(frozen=True)
class Costs:
    """Rates of losses per second, and what an event takes in seconds."""

    save_s: float
    trainer_losses_per_s: float
    trainer_restart_s: float
    engine_losses_per_s: float
    engine_loss_s: float
    """By which the loss of an engine delays an iteration."""


@dataclass(frozen=True)
class Played:
    """One draw."""

    seconds: dict[str, float]
    """By cause. They add up to the wall time."""
    counts: dict[str, int]
    """Of `REPEATED`, `RESTARTS` and `ENGINES`."""

    @property
    def wall(self) -> float:
        """Seconds of the run."""
        return sum(self.seconds.values())


def play(
    iteration_s: Sequence[float] | np.ndarray,
    evaluation_s: Sequence[float] | np.ndarray,
    config: Config,
    costs: Costs,
    seed: int,
) -> Played:
    """Play all iterations; `iteration_s` and `evaluation_s` have a value in seconds for each.

    Losses are a Poisson process. That of a trainer rank repeats everything since the last checkpoint; restarts may fail too.
    UserError if losses are so frequent that the run reaches no checkpoint.
    """
    _check_progress(iteration_s, config, costs)
    draw, last = random.Random(seed), len(iteration_s)
    seconds = dict.fromkeys((ITERATIONS, EVALUATIONS, CHECKPOINTS, REPEATED, RESTARTS, ENGINES), 0.0)
    counts = dict.fromkeys((REPEATED, RESTARTS, ENGINES), 0)
    unsaved = {ITERATIONS: 0.0, EVALUATIONS: 0.0}
    saved = done = 0
    until_loss = _next(draw, costs.trainer_losses_per_s)
    if config.evaluation.before_training:
        seconds[EVALUATIONS] += float(evaluation_s[0])
    while done < last:
        saves = _due(config.checkpoint.every, done + 1, last)
        step = {
            ITERATIONS: float(iteration_s[done]),
            EVALUATIONS: float(evaluation_s[done]) if _due(config.evaluation.every, done + 1, last) else 0.0,
        }
        engines = _poisson(draw, costs.engine_losses_per_s * step[ITERATIONS])
        delay, saving = engines * costs.engine_loss_s, costs.save_s if saves else 0.0
        passed = sum(step.values()) + delay + saving
        if until_loss < passed:
            seconds[REPEATED] += sum(unsaved.values()) + until_loss
            counts[REPEATED] += done - saved
            unsaved, done = dict.fromkeys(unsaved, 0.0), saved
            until_loss = _restart(draw, costs, seconds, counts)
            continue
        until_loss -= passed
        done += 1
        seconds[ENGINES] += delay
        seconds[CHECKPOINTS] += saving
        counts[ENGINES] += engines
        unsaved = {name: unsaved[name] + step[name] for name in step}
        if saves:
            saved = done
            for name in unsaved:
                seconds[name] += unsaved[name]
            unsaved = dict.fromkeys(unsaved, 0.0)
    return Played(seconds, counts)


def _restart(draw: random.Random, costs: Costs, seconds: dict[str, float], counts: dict[str, int]) -> float:
    """Restart until one attempt is not lost itself. Returns the seconds from then to the next loss."""
    while True:
        counts[RESTARTS] += 1
        until_loss = _next(draw, costs.trainer_losses_per_s)
        seconds[RESTARTS] += min(until_loss, costs.trainer_restart_s)
        if until_loss >= costs.trainer_restart_s:
            return until_loss - costs.trainer_restart_s


def _check_progress(iteration_s: Sequence[float] | np.ndarray, config: Config, costs: Costs) -> None:
    every = min(config.checkpoint.every or len(iteration_s), len(iteration_s))
    between = max(every * max(iteration_s), costs.trainer_restart_s)
    if between * costs.trainer_losses_per_s > HOPELESS:
        raise UserError(
            f"the trainer is lost once in {1 / costs.trainer_losses_per_s / 3600:.3g} h on average and needs {between / 3600:.3g} "
            "h from one checkpoint to the next, so that the run makes no progress: lower checkpoint.every or raise "
            "--gpu-mtbf-hours"
        )


def _due(every: int, done: int, last: int) -> bool:
    """As `driver.loop.Loop`: the last iteration always is."""
    return done == last or (every > 0 and done % every == 0)


def _next(draw: random.Random, rate: float) -> float:
    """Seconds until the next event of a Poisson process."""
    return draw.expovariate(rate) if rate > 0 else math.inf


def _poisson(draw: random.Random, mean: float) -> int:
    """Events in a time in which `mean` are expected."""
    events, left = 0, 1.0
    while (left := left - _next(draw, mean)) > 0:
        events += 1
    return events
