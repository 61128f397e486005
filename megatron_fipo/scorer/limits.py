"""Limits of time and memory for code that is not trusted to end, within this process."""

import os
import resource
import signal
import time
from collections.abc import Callable
from typing import TypeVar

import psutil

REPEAT_S = 1.0
"""Seconds between two time limit errors, if the first is caught."""

Result = TypeVar("Result")


class TimeLimitError(BaseException):
    """A call takes too long. Not an `Exception`, which the called code may catch."""


def within(seconds: float, function: Callable[[], Result]) -> Result:
    """The result of `function`. Raises `TimeLimitError` if it takes more than `seconds`.

    Only in the main thread, since it uses SIGALRM. Code that catches the error gets it again every
    `REPEAT_S`, and its result does not count, nor does that of code that uses SIGALRM itself. Compiled code is
    interrupted only when it returns to Python. A process that the code forked ends when it returns here.
    """

    def expire(*_: object) -> None:
        raise TimeLimitError

    process, start = os.getpid(), time.monotonic()
    signal.signal(signal.SIGALRM, expire)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, REPEAT_S)
        return function()
    finally:
        if os.getpid() != process:
            os._exit(0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if time.monotonic() - start >= seconds:
            raise TimeLimitError


def limit_memory(megabytes: int) -> None:
    """Let this process allocate `megabytes` more; beyond it Python raises `MemoryError`.

    Counts private writable memory (RLIMIT_DATA): not shared memory, such as Ray's object store.
    """
    soft = psutil.Process().memory_info().data + megabytes * 2**20
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
