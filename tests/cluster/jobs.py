"""Training runs as Slurm jobs on the test cluster."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from tests.cluster.slurm import SlurmCluster
from tests.cluster.slurm_conf import LOGIN
from tests.system.runs import ROOT, TINY, command

BIN = Path(sys.executable).parent
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "PATH": f"{BIN}:{os.environ['PATH']}"}
"""Of the shell on the login node; sbatch passes it on."""
SMALL = (
    f"model.path={ROOT}/examples/countdown/base-model",
    *TINY,
    "evaluation.before_training=false",
    "parallel.data_parallel_size=3",
)
ON_CPUS = ("--nodes=2", "--gpus-per-node=0", "--cpus-per-node=2", "--preflight=false", "--time=20")
"""Three ranks and an engine on two nodes of two CPUs: ranks on both."""
START_S = 240.0
"""Seconds in which a run must have started on a busy machine."""


def launch(cluster: SlurmCluster, run_dir: Path, *words: str, options: Sequence[str] = ON_CPUS) -> int:
    """`megatron-fipo launch slurm` on the login node; returns the job id."""
    words = (
        "launch",
        "slurm",
        f"{ROOT}/examples/countdown/fipo.yaml",
        *options,
        *SMALL,
        f"run_dir={run_dir}",
        *words,
    )
    done = cluster.exec_on(LOGIN, command(*words), env=ENVIRONMENT)
    return int(next(line for line in done.stdout.splitlines() if line.isdigit()))


def attempt_logs(run_dir: Path, job: int, restart: int = 0) -> Path:
    return run_dir / "logs" / f"{job}-{restart}"


def job_log(run_dir: Path, job: int) -> str:
    """What all attempts have printed."""
    return (run_dir / "logs" / f"slurm-{job}.log").read_text(errors="replace")


def wait_for(
    condition: Callable[[], object], what: str, timeout: float = START_S, poll_s: float = 0.3
) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"no {what} after {timeout:g} s"
        time.sleep(poll_s)


def driver(cluster: SlurmCluster, node: str, run_dir: Path) -> psutil.Process | None:
    """The process of `megatron-fipo train`."""
    for process in cluster.processes(node):
        try:
            words = process.cmdline()
        except psutil.Error:  # it has ended
            continue
        is_python = bool(words) and Path(words[0]).name.startswith("python")
        if is_python and f"run_dir={run_dir}" in words and words[-1].startswith("ray_address="):
            return process
    return None


def assert_nothing_left(cluster: SlurmCluster, run_dir: Path, folders: bool = False) -> None:
    """No process, port, token or, unless `folders` may stay, folder of a job that has ended, on any node that runs."""

    def only_slurm(node: str) -> bool:
        return {process.name() for process in cluster.processes(node)} <= {"bash", "slurmd"}

    for node in cluster.running:
        wait_for(lambda node=node: only_slurm(node), f"end of all processes on {node}", 60)
        assert folders or not list(cluster.local_folder(node).glob("fipo-*"))
        assert {listener.program for listener in cluster.listening_sockets(node)} <= {"slurmd"}
    assert not list(run_dir.glob("logs/*/.ray_token"))
