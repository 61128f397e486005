"""A Slurm of two nodes for the tests of this folder, which carry the mark `cluster`."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm import SlurmCluster, missing, remove_leftovers

FOLDER = Path("/var/tmp")
"""Where the files of clusters are: a folder that all nodes share."""


@pytest.fixture(scope="session")
def cluster_folder() -> Iterator[Path]:
    """Parent folder for clusters. Skips the test if none can run here."""
    if reason := missing():
        pytest.skip(f"a Slurm cluster {reason}")
    remove_leftovers(FOLDER)
    with pytest.MonkeyPatch.context() as environment:
        # Jobs inherit the environment. The tests of one machine confine gloo to it.
        environment.delenv("GLOO_SOCKET_IFNAME", raising=False)
        yield FOLDER


@pytest.fixture(scope="session")
def two_nodes(cluster_folder: Path) -> Iterator[SlurmCluster]:
    """The cluster that tests share. `KEEP_CLUSTER_FOLDER=1` leaves its files, to debug."""
    keep = "KEEP_CLUSTER_FOLDER" in os.environ
    with SlurmCluster(cluster_folder, nodes=2, cpus=8, keep_folder=keep) as cluster:
        yield cluster


@pytest.fixture
def cluster(two_nodes: SlurmCluster) -> Iterator[SlurmCluster]:
    """Two idle nodes of 8 CPUs. Afterwards jobs of the test are cancelled and nodes that it killed run again."""
    yield two_nodes
    two_nodes.cancel_all()
    two_nodes.start_missing()
    two_nodes.wait_idle()
