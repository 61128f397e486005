"""A process that ends with its parent, and ends all that descend from it: by kinship, never by name."""

import ctypes
import os
import signal
import subprocess
from contextlib import suppress

import psutil

END_TIMEOUT_S = 20.0
"""Seconds that children may take to end before they are killed."""
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


def end_with_parent() -> None:
    """Let the kernel send this process SIGTERM when the thread that started it ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose parent ends, so that `end_children` finds them."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_children(first: subprocess.Popen) -> None:
    """Ask `first` to end, and then kill every descendant of this process that is left. Waits until all have ended."""
    with suppress(ProcessLookupError):
        first.terminate()
    with suppress(subprocess.TimeoutExpired):
        first.wait(END_TIMEOUT_S)
    while children := psutil.Process().children(recursive=True):
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(children, timeout=END_TIMEOUT_S)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
