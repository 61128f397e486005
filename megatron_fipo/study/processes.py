"""The processes of a study's runs: at most so many at one time, each with a log, a time limit and a process group of its own.

A terminal sends Ctrl-C to its foreground group only, so the study passes signals on: every run gets each signal once.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from megatron_fipo.driver.stop import SIGNALS
from megatron_fipo.exit_codes import INTERRUPTED, SAVED
from megatron_fipo.node.processes import end_with_parent

POLL_S = 0.2
GRACE_S = 600.0
"""Seconds that a run has to save its state at its time limit, before it is killed."""


@dataclass(frozen=True)
class Job:
    """One run as a process."""

    name: str
    config: Path
    """File of its settings."""
    log: Path
    """What it prints is added here."""

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "megatron_fipo.cli", "train", str(self.config)]


@dataclass(frozen=True)
class Ended:
    """A process that has ended."""

    job: Job
    code: int
    """Its exit code; negative if a signal ended it."""
    seconds: float
    timed_out: bool


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen
    started: float = field(default_factory=time.monotonic)
    asked: float | None = None
    """When its time limit had passed and it was asked to stop."""


class Processes:
    """Runs jobs, and ends them on SIGINT, SIGTERM and SIGUSR1 (main thread only)."""

    def __init__(self, at_once: int, limit_s: float | None, environment: Mapping[str, str]) -> None:
        self._at_once, self._limit_s, self._environment = at_once, limit_s, dict(environment)
        self._running: list[_Running] = []
        self.signal: int | None = None
        """The first signal that asked the study to stop."""

    @property
    def exit_code(self) -> int | None:
        """Of a study that was asked to stop; None if it was not."""
        if self.signal is None:
            return None
        return INTERRUPTED if self.signal == signal.SIGINT else SAVED

    def run(self, jobs: Iterable[Job], started: Callable[[Job], None]) -> Iterator[Ended]:
        """Start the jobs in order and yield each when it has ended. After a signal no more are started."""
        waiting = iter(jobs)
        with self._signals():
            try:
                while True:
                    while self.signal is None and len(self._running) < self._at_once:
                        job = next(waiting, None)
                        if job is None:
                            break
                        self._start(job)
                        started(job)
                    if not self._running:
                        return
                    yield from self._take_ended()
                    time.sleep(POLL_S)
            finally:
                self._end_all()

    def _start(self, job: Job) -> None:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("ab") as log:
            process = subprocess.Popen(
                job.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | self._environment,
                process_group=0,
                preexec_fn=end_with_parent,
            )
        self._running.append(_Running(job, process))
        if self.signal is not None:  # it came while the process was started
            process.send_signal(self.signal)

    def _take_ended(self) -> Iterator[Ended]:
        now = time.monotonic()
        for running in list(self._running):
            code = running.process.poll()
            if code is not None:
                self._running.remove(running)
                yield Ended(running.job, code, now - running.started, running.asked is not None)
            elif self._limit_s is not None:
                self._limit(running, now, self._limit_s)

    def _limit(self, running: _Running, now: float, limit_s: float) -> None:
        if running.asked is None and now - running.started > limit_s:
            running.asked = now
            running.process.send_signal(signal.SIGTERM)
        elif running.asked is not None and now - running.asked > GRACE_S:
            running.process.kill()  # its Ray cluster ends with it

    @contextmanager
    def _signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.signal = self.signal or number
        for running in self._running:
            running.process.send_signal(number)

    def _end_all(self) -> None:
        """After an error of the study itself: let the runs save their state."""
        for running in self._running:
            running.process.terminate()
        for running in self._running:
            running.process.wait()
        self._running.clear()
