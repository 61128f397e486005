"""The loss of the Ray cluster that this process started or joined. After it, nothing may call Ray.

Ray's client waits a minute for a dead cluster and then ends the process, and its shutdown waits as well. So whoever waits for
Ray asks `check_cluster`, and the process ends in `leave_if_lost`. Imports no Ray: the command line uses it.
"""

import os
import sys
import threading

from megatron_fipo.errors import LostError
from megatron_fipo.exit_codes import LOST

NOTICE_S = 8.0
"""Seconds in which the main thread must notice the loss. Inside a call of Ray it cannot."""
ERROR_DELAY_S = 1.0
"""Seconds by which the failure of an actor may be seen before the loss that caused it."""

OWN_PROCESSES = (
    "Ray's processes on this machine ended unexpectedly (killed, or out of memory: see the kernel's log)"
)
"""The loss of a cluster that this process started."""

_lost = threading.Event()
_reason = OWN_PROCESSES
_noticed = threading.Event()


class ClusterLostError(LostError):
    """Ray's own processes ended: all ranks and engines are gone, and nothing more can be saved by this process."""

    def __init__(self, reason: str = OWN_PROCESSES) -> None:
        super().__init__(
            f"{reason}; run the same command again, which resumes a training run from its last checkpoint"
        )


def cluster_started() -> None:
    """A new cluster runs: an earlier loss is forgotten."""
    _lost.clear()
    _noticed.clear()


def cluster_lost(reason: str = OWN_PROCESSES) -> None:
    """Called by another thread than the main one, which then must notice; else this ends the process, with code `LOST`."""
    global _reason
    _reason = reason
    _lost.set()
    if not _noticed.wait(NOTICE_S):
        print(f"megatron-fipo: {ClusterLostError(reason)}", file=sys.stderr, flush=True)
        os._exit(LOST)


def is_lost() -> bool:
    """Whether the cluster is lost; then the caller skips what it would ask of Ray."""
    if _lost.is_set():
        _noticed.set()
    return _lost.is_set()


def check_cluster(delay_s: float = 0.0) -> None:
    """Raises `ClusterLostError` if the cluster is lost, or is found to be within `delay_s`."""
    _lost.wait(delay_s)
    if is_lost():
        raise ClusterLostError(_reason)


def leave_if_lost(code: int) -> None:
    """End the process with `code` if the cluster is lost: Ray's handlers of a normal exit would wait for it, then crash."""
    if is_lost():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
