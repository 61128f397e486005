"""Measures this machine: one process after another, so that none disturbs another, within `LIMIT_S`."""

import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import date
from itertools import chain
from pathlib import Path

import psutil

from megatron_fipo.calibrate.job import CONFIG, FIGURES, Job
from megatron_fipo.calibrate.machine import Calibration, Found, assemble, sources
from megatron_fipo.calibrate.messages import Device, Message, from_line
from megatron_fipo.config import save_config
from megatron_fipo.errors import UserError
from megatron_fipo.node.preflight.children import Check
from megatron_fipo.plan.case import Case

LIMIT_S = 175.0
"""Of the entire calibration."""
START_S = 10.0
"""Seconds that the start of a process takes at least."""
CPU_RANKS = 2
"""Processes of the all-reduce on a machine without GPUs."""
ONE_NODE = "it needs several nodes; `megatron-fipo preflight` measures the network of a job"
ONE_GPU = "it needs two GPUs"
STEP = "it needs complete training steps"


@dataclass(frozen=True)
class Kind:
    """A measuring process."""

    name: str
    title: str
    budget_s: float
    start_s: float
    """In addition, to import and to end."""
    figures: tuple[str, ...]
    """That it measures."""


RANK = Kind("rank", "copies, products, layers, disk", 60.0, 40.0, tuple(chain(*FIGURES.values())))
COLLECTIVE = Kind("collective", "all-reduce", 10.0, 25.0, ("node",))
DECODE = Kind("decode", "rollout engine", 50.0, 100.0, ("decode", "prefill"))


def calibrate(case: Case, base: str, name: str, note: Callable[[str], None]) -> Calibration:
    """Measure for the run of `case`, whose machine, loaded from `base`, stands in for what cannot be measured here.

    `note` gets the name of each part when it begins. UserError if no process can measure anything.
    """
    until = time.monotonic() + LIMIT_S
    failures = {"network": ONE_NODE, "fragmentation": STEP}
    with tempfile.TemporaryDirectory(prefix="megatron-fipo-calibrate-") as folder:
        save_config(case.config, Path(folder) / CONFIG)
        job = Job(folder, base, str(disk_folder(case)), 0.0, 1, os.getpid())

        def measure(kind: Kind, ranks: int) -> list[Message]:
            note(kind.title)
            found, failure = _measure(kind, replace(job, ranks=ranks), until)
            if failure:
                failures.update(dict.fromkeys(kind.figures, failure))
            return found

        messages = measure(RANK, 1)
        device = next((message for message in messages if isinstance(message, Device)), None)
        if device is None:
            raise UserError(f"this machine cannot be measured: {failures['memory']}")
        if device.count == 1:
            failures["node"] = ONE_GPU
        else:
            messages += measure(COLLECTIVE, device.count or CPU_RANKS)
        messages += measure(DECODE, 1)
    where = sources(case, device.name, date.today().isoformat())
    devices, memory = device.count or case.devices, psutil.virtual_memory().total
    return assemble(case, name, devices, memory, where, Found(messages, failures))


def disk_folder(case: Case) -> Path:
    """The nearest folder above run_dir that exists."""
    run_dir = Path(os.path.abspath(case.config.run_dir))
    return next(folder for folder in run_dir.parents if folder.is_dir())


def _measure(kind: Kind, job: Job, until: float) -> tuple[list[Message], str | None]:
    """What the processes of a kind have found, and why it is not all."""
    left = until - time.monotonic()
    budget = min(kind.budget_s, left - START_S)
    if budget <= 0:
        return [], f"no time was left of {LIMIT_S:.0f} s"
    deadline = min(until, time.monotonic() + budget + kind.start_s)
    return _run(kind.name, replace(job, budget_s=budget), deadline)


def _run(name: str, job: Job, deadline: float) -> tuple[list[Message], str | None]:
    arguments = name, json.dumps(asdict(job))
    messages: list[Message] = []
    failure: str | None = None
    with ExitStack() as stack:
        checks = [
            stack.enter_context(Check("megatron_fipo.calibrate.measure", *arguments, str(rank)))
            for rank in range(job.ranks)
        ]
        for check in checks:
            lines, reason = check.results(deadline)
            messages += map(from_line, lines)
            failure = failure or reason
    return messages, failure
