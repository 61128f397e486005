"""Requests to stop a run before its last iteration."""

import contextlib
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import psutil

from megatron_fipo.exit_codes import INTERRUPTED, SAVED

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stop:
    """Handles stop signals while it is open as a context manager (main thread only).

    The first signal requests a stop: the loop checks `requested` at points where nothing is half done. Later signals are
    logged, but only a second SIGINT raises `KeyboardInterrupt` at once: schedulers send SIGTERM again, or after SIGUSR1,
    while the state is being saved. `max_walltime_minutes` counts from the start of the process and only requests. `log`
    prints a line for the user.
    """

    def __init__(self, max_walltime_minutes: float | None, log: Callable[[str], None]) -> None:
        self._limit_minutes = max_walltime_minutes
        self._started = time.monotonic() - (time.time() - psutil.Process().create_time())
        self._log = log
        self._reason: str | None = None
        self._interrupts = 0
        self._previous: dict[int, Any] = {}
        self.exit_code = 0
        """Exit code of the process, unless something else decides it."""

    def requested(self) -> str | None:
        """The reason to stop, for the console; None if the run may continue. A reason stays once it is set."""
        limit = self._limit_minutes
        if self._reason is None and limit is not None and time.monotonic() - self._started >= limit * 60:
            reason = f"max_walltime_minutes={limit:g} has passed"
            self._request(reason, SAVED)
            self._log(f"{reason}: stopping here")
        return self._reason

    def __enter__(self) -> "Stop":
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            self.exit_code = INTERRUPTED
            raise KeyboardInterrupt
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        stopping = "stopping" if self._reason is None else "stopping already,"
        self._request(name, INTERRUPTED if number == signal.SIGINT else SAVED)
        at_once = "Ctrl-C again" if self._interrupts else "Ctrl-C twice"
        # A signal may arrive during a print, where another print raises RuntimeError.
        with contextlib.suppress(RuntimeError):
            self._log(
                f"{name}: {stopping} at the next safe point ({at_once} to stop at once, losing the work since the last checkpoint)"
            )

    def _request(self, reason: str, exit_code: int) -> None:
        if self._reason is None:
            self._reason, self.exit_code = reason, exit_code
