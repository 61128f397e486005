"""The process that owns the Ray cluster of a run: a program of its own, which imports nothing of this package.

    python -P cluster_process.py OPTIONS

Starts Ray with OPTIONS (JSON, the arguments of `ray.init`; the folder above `_temp_dir` is the run's own), writes the
address of the cluster as a line to standard output, and ends the cluster when standard input closes, so also when the
process that started this one is killed. If a server of Ray ends before, this process ends at once with code 1, and with
it the kernel kills what is left of Ray.

The driver gives it a process group of its own: a signal to the driver's group, as a terminal or a scheduler sends it, does not
reach Ray, which is needed to save the state.
"""

import json
import os
import shutil
import signal
import sys
import threading

import psutil
import ray

SERVERS = ("gcs_server", "raylet")
"""Names of the processes without which a cluster does nothing."""


def main() -> None:
    parent = os.getppid()
    options = json.loads(sys.argv[1])
    # Ray prints messages at any time: they go to the log, and only the address to the driver.
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    signal.signal(
        signal.SIGUSR1, signal.SIG_IGN
    )  # of all processes of a job, as some schedulers send it; inherited by Ray
    ray.init(**options)
    closing = threading.Event()
    for child in psutil.Process().children():
        if child.name() in SERVERS:
            threading.Thread(target=end_with, args=(child.pid, closing), daemon=True).start()
    print(ray.get_runtime_context().gcs_address, file=answer, flush=True)
    sys.stdin.read()
    closing.set()
    ray.shutdown()
    if os.getppid() != parent:  # else the driver decides whether the logs stay
        shutil.rmtree(os.path.dirname(options["_temp_dir"]), ignore_errors=True)


def end_with(server: int, closing: threading.Event) -> None:
    """End this process when a server ends, unless the cluster is `closing`."""
    os.waitid(os.P_PID, server, os.WEXITED | os.WNOWAIT)
    if not closing.is_set():
        os._exit(1)


if __name__ == "__main__":
    main()
