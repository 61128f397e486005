"""Limits of time and memory for code that is not trusted to end, within this process."""

import resource
import signal
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
    `REPEAT_S`, and its result does not count. Compiled code is interrupted only when it returns to Python.
    """
    expired = False

    def expire(*_: object) -> None:
        nonlocal expired
        expired = True
        raise TimeLimitError

    signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds, REPEAT_S)
    try:
        return function()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if expired:
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
