"""Tests on a real Ray cluster, in a pytest process for this folder alone: Ray's threads exclude the forks of `tests.ranks`."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault(
    "RAY_worker_niceness", "0"
)  # else 15: other tests on this machine would starve ranks and engines

import ray

from megatron_fipo.driver.cluster import logs_in
from tests.system.runs import LONGEST_S, ROOT, run_here, train_arguments


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster to which this process is connected, with 6 logical CPUs and 2 logical GPUs on any machine."""
    context: Any = ray.init(
        address="local",  # also if a cluster runs on this machine
        num_cpus=6,
        num_gpus=2,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        log_to_driver=False,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}},
    )
    with logs_in(Path(context.address_info["session_dir"], "logs")):
        yield
    ray.shutdown()


CLUSTER = """
import sys, ray
store, gpus = 256 * 2**20, int(sys.argv[1])
ray.init(address="local", num_cpus=6, num_gpus=gpus, include_dashboard=False, object_store_memory=store, log_to_driver=False)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@contextmanager
def started_cluster(gpus: int) -> Iterator[str]:
    """Address of a cluster that runs join one after another, with 6 logical CPUs and so many logical GPUs.

    A child process starts it, and ends it when its standard input closes, also if this process is killed.
    """
    command = [sys.executable, "-c", CLUSTER, str(gpus)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdin is not None
        assert owner.stdout is not None
        address = owner.stdout.readline().strip()
        assert address, "Ray did not start"
        yield address
        owner.stdin.close()
        assert owner.wait(timeout=LONGEST_S) == 0


@pytest.fixture(scope="module")
def cluster_of_runs() -> Iterator[str]:
    """The cluster of the runs of a module, without a GPU."""
    with started_cluster(gpus=0) as address:
        yield address


Train = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="module")
def train(cluster_of_runs: str) -> Train:
    """Run `megatron-fipo train` in this process, on the module's cluster: without the seconds that starting both takes."""

    def train(run_dir: Path, *overrides: str, expect: int = 0) -> subprocess.CompletedProcess:
        address = f"ray_address={cluster_of_runs}"
        return run_here(*train_arguments(run_dir, address, *overrides), expect=expect)

    return train
