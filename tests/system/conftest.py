"""Tests on a real Ray cluster. Ray's threads and `tests.ranks` (fork) don't mix, so this folder runs as a pytest process of its own."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """One cluster per session; 6 logical CPUs and 2 logical GPUs, whatever the machine has."""
    ray.init(
        num_cpus=6,
        num_gpus=2,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        log_to_driver=False,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}},
    )
    yield
    ray.shutdown()
