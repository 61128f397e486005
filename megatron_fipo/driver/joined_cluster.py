"""Watches a Ray cluster that this process has joined.

Ray's client waits a minute for a head that is gone and then ends the process with code 1, which no scheduler requeues.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_fipo.driver.cluster_loss import cluster_lost, cluster_started
from megatron_fipo.network import ServerWatch

PERIOD_S = 2.0
LOST_AFTER_S = 30.0
"""Seconds without an answer. A head that stores its state elsewhere may start again meanwhile."""


@contextmanager
def watching(address: str) -> Iterator[None]:
    """While the context is open, report the cluster lost if its head at `address` (IP:PORT) accepts no connections."""
    cluster_started()
    left = threading.Event()
    threading.Thread(target=_watch, args=(address, left), daemon=True).start()
    try:
        yield
    finally:
        left.set()


def _watch(address: str, left: threading.Event) -> None:
    head = ServerWatch(address, LOST_AFTER_S)
    while not left.wait(PERIOD_S):
        if head.is_lost():
            cluster_lost(f"Ray's head at {address} has not answered for {LOST_AFTER_S:g} s")
            return
