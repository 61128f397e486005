"""Requeues a job whose first node is lost.

Slurm leaves such a job running (--no-kill), without the batch script that would requeue it. So the first of the other nodes does.
"""

import subprocess
import threading
from collections.abc import Mapping

from megatron_fipo.network import ServerWatch

PATIENCE_S = 120.0
"""Seconds in which the batch script, if it still runs, has noticed the loss of Ray's head and ends this step."""


def requeue_if_orphaned(head: ServerWatch, environment: Mapping[str, str], stop: threading.Event) -> None:
    """Called when Ray has ended on a node that is not the first: requeue the job if nobody else does.

    Returns at once if the head runs: then the job can do without this node.
    """
    if environment["SLURM_PROCID"] == "0" and is_orphaned(head, stop):
        job = environment["SLURM_JOB_ID"]
        print(f"the first node is lost with the batch script, so job {job} is requeued from here", flush=True)
        subprocess.run(["scontrol", "requeue", job])


def is_orphaned(head: ServerWatch, stop: threading.Event) -> bool:
    """Whether Ray's head is lost, and until then the batch script has not set `stop`."""
    while not head.is_lost():
        if stop.wait(0.1) or head.answers():
            return False
    return not stop.is_set()
