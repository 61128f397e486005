"""The same run on other numbers of GPUs, with the same split between trainer and engines."""

import math
from dataclasses import dataclass

from megatron_fipo.config import validate
from megatron_fipo.errors import UserError
from megatron_fipo.plan.case import Case
from megatron_fipo.simulate.operation import Operation
from megatron_fipo.simulate.training import TimesOf, Training, measured_iterations, play_all, simulate_window

FEWEST, MOST = 8, 4096
"""GPUs."""
RESPONSES = 20_000
"""Responses to simulate for each number of GPUs: one iteration if it is large. All use the same seeds."""


@dataclass(frozen=True)
class Curve:
    """Runs on ascending numbers of GPUs."""

    runs: tuple[Training, ...]
    refused: str | None
    """Why the curve ends below `MOST`: the first larger number of GPUs, and what forbids it; None if nothing does."""


def simulate_scaling(case: Case, operation: Operation, times_of: TimesOf) -> Curve:
    """Simulate the run of a case on other numbers of GPUs: in the middle of training, at the planner's values, and without
    the loss of engines.

    Fewer GPUs than the case has are left out if its settings forbid them, as ranks that share experts do.
    """
    runs: list[Training] = []
    for scaled in scaled_cases(case):
        try:
            validate(scaled.config, scaled.architecture)
            runs.append(_run(scaled, operation, times_of))
        except UserError as error:
            if scaled.devices < case.devices:
                continue
            return Curve(tuple(runs), f"{scaled.devices:,} GPUs: {error}")
    return Curve(tuple(runs), None)


def _run(case: Case, operation: Operation, times_of: TimesOf) -> Training:
    times = times_of(case, "value")
    windows = (simulate_window(case, times, 0.5, measured_iterations(case, 1, RESPONSES)),)
    return Training(case, windows, play_all(case, operation, times, windows, engine_loss_s=0.0), 1.0, 1.0)


def scaled_cases(case: Case) -> list[Case]:
    """The smallest unit of replicas and engines with the split of `case`, times powers of two, and `case` itself.

    Example: 4 replicas of 8 ranks and 6 engines of 1 GPU are 2 units of (2 replicas, 3 engines) = 19 GPUs, and give
    19, 38 (`case`), 76, ... 2,432 GPUs.
    """
    replicas, engines = case.config.parallel.data_parallel_size, case.config.rollout.num_engines
    units = math.gcd(replicas, engines)
    multiples = sorted({2**power for power in range(13)} | {units})
    scaled = [
        case.changed(
            parallel={"data_parallel_size": replicas // units * times},
            rollout={"num_engines": engines // units * times},
        )
        for times in multiples
    ]
    return [one for one in scaled if FEWEST <= one.devices <= MOST or one.devices == case.devices]
