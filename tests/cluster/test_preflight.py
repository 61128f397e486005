"""The preflight on a real Slurm of two nodes: each planted fault is found, and its node is named."""

import sys
import uuid

import pytest

from tests.cluster.slurm import Job, SlurmCluster
from tests.node.fake_smi import HEALTHY, install_smi
from tests.system.runs import ROOT

pytestmark = pytest.mark.cluster

PATIENT = "--check-timeout-s=100 --network-timeout-s=100 --pair-timeout-s=60"
LENIENT = "--min-open-files=1024 --min-tmp-gib=0 --min-shm-gib=0 --xid-hours=0"
ON_NODE2 = '[ "$SLURMD_NODENAME" = node2 ] &&'


class Preflight:
    """`megatron-fipo preflight` in a job on both nodes."""

    def __init__(self, cluster: SlurmCluster) -> None:
        self._cluster = cluster
        self.folder = cluster.folder / uuid.uuid4().hex
        self.folder.mkdir()
        self._bad = self.folder / "bad-nodes"

    def run(self, *options: str, before: str = ":") -> tuple[Job, str]:
        """The ended job and its output. `before` is a line of bash that runs on each node before the command."""
        command = f"{sys.executable} -m megatron_fipo.cli preflight {PATIENT} {LENIENT}"
        on_node = self.folder / "on_node.sh"
        on_node.write_text(
            f"{before}\nexec {command} --run-dir={self.folder / 'run'} --bad-nodes={self._bad} {' '.join(options)}\n"
        )
        script = self.folder / "job.sbatch"
        script.write_text(
            f"#!/bin/bash\nunset GLOO_SOCKET_IFNAME\nsrun --ntasks-per-node=1 --kill-on-bad-exit=1 bash {on_node}\n"
        )
        job = self._cluster.submit(script, options=["--nodes=2"], env={"PYTHONPATH": str(ROOT)})
        ended = self._cluster.wait(job, "COMPLETED", "FAILED", timeout=250)
        return ended, self._cluster.output(job)

    def fault(self, sentence: str, *options: str, before: str = ":", code: int = 2) -> list[str]:
        """Run it; it must find one fault with this sentence, and srun exit with `code`. Returns the nodes to exclude."""
        ended, output = self.run(*options, before=before)
        assert ended.state == "FAILED", output
        assert ended.exit_code == code, output
        assert sentence in output, output
        assert "2 nodes, 1 fault," in output
        return self._bad.read_text().split()


@pytest.fixture
def preflight(cluster: SlurmCluster) -> Preflight:
    return Preflight(cluster)


def test_healthy_nodes(preflight: Preflight) -> None:
    ended, output = preflight.run()
    assert ended.state == "COMPLETED", output
    assert "2 nodes, no faults" in output
    assert list((preflight.folder / "run").iterdir()) == []


def test_a_node_with_a_gpu_fewer(preflight: Preflight) -> None:
    for name, count in (("node1", 8), ("node2", 7)):
        install_smi(preflight.folder / name, HEALTHY * count)
    bad = preflight.fault(
        "node2 has 0 GPUs by torch and 7 by nvidia-smi, the other node has 0 GPUs by torch and 8 by nvidia-smi",
        before=f'export PATH="{preflight.folder}/$SLURMD_NODENAME:$PATH"',
    )
    assert bad == ["node2"]


def test_a_gpu_with_memory_errors(preflight: Preflight) -> None:
    for name, errors in (("node1", 0), ("node2", 3)):
        install_smi(preflight.folder / name, HEALTHY.replace(" 0,", f" {errors},"))
    bad = preflight.fault(
        "node2: GPU 0 has 3 uncorrected memory errors, 0 are allowed",
        before=f'export PATH="{preflight.folder}/$SLURMD_NODENAME:$PATH"',
    )
    assert bad == ["node2"]


def test_a_full_tmp(cluster: SlurmCluster, preflight: Preflight) -> None:
    cluster.exec_on("node2", ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", "/tmp"])
    try:
        cluster.exec_on("node2", ["fallocate", "-l", "60m", "/tmp/full"])
        bad = preflight.fault(
            "node2: /tmp has 0 GiB free, 0.5 are needed (--min-tmp-gib)", "--min-tmp-gib=0.5"
        )
    finally:
        cluster.exec_on("node2", ["umount", "/tmp"])
    assert bad == ["node2"]


def test_a_small_shared_memory(cluster: SlurmCluster, preflight: Preflight) -> None:
    cluster.exec_on("node2", ["mount", "-o", "remount,size=64m", "/dev/shm"])
    try:
        bad = preflight.fault(
            "node2: /dev/shm has 0.06 GiB free, 1 are needed (--min-shm-gib)", "--min-shm-gib=1"
        )
    finally:
        cluster.exec_on("node2", ["mount", "-o", "remount,size=50%", "/dev/shm"])
    assert bad == ["node2"]


def test_a_low_limit_of_open_files(preflight: Preflight) -> None:
    sentence = "node2: a process may open 600 files (ulimit -n), 1024 are needed (--min-open-files)"
    assert preflight.fault(sentence, before=f"{ON_NODE2} ulimit -n 600") == ["node2"]


def test_an_unshared_folder(cluster: SlurmCluster, preflight: Preflight) -> None:
    run = preflight.folder / "run"
    run.mkdir()
    cluster.exec_on("node2", ["mount", "-t", "tmpfs", "tmpfs", str(run)])
    try:
        bad = preflight.fault(f"node2 does not share {run} with node1: the head's file did not appear")
    finally:
        cluster.exec_on("node2", ["umount", str(run)])
    assert bad == []  # of two nodes it may be either, and the folder itself


def test_another_version(preflight: Preflight) -> None:
    package = preflight.folder / "packages" / "ray-1.2.3.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: ray\nVersion: 1.2.3\n")
    before = f'{ON_NODE2} export PYTHONPATH="{package.parent}:$PYTHONPATH"'
    assert preflight.fault("node2 has ray 1.2.3, the other node has ray", before=before) == ["node2"]


def test_a_slow_link(cluster: SlurmCluster, preflight: Preflight) -> None:
    cluster.slow_link("node2", "tbf", "rate", "10mbit", "burst", "32k", "latency", "1s")
    try:
        bad = preflight.fault("node1 and node2 exchange 0.00", "--min-bandwidth-gb-per-s=0.01")
    finally:
        cluster.restore_link("node2")
    assert bad == ["node1", "node2"]


def test_a_missing_node(preflight: Preflight) -> None:
    before = f"{ON_NODE2} exec sleep 1000"
    # srun ends the step when the head ends, and returns the highest code of its tasks: that of the task which it terminated.
    bad = preflight.fault("node2 did not answer in 10 s", "--join-timeout-s=10", before=before, code=143)
    assert bad == ["node2"]


def test_a_check_that_hangs(preflight: Preflight) -> None:
    """As on a node whose driver no longer answers."""
    folder = preflight.folder / "node2"
    folder.mkdir()
    (folder / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 1000\n")
    (folder / "nvidia-smi").chmod(0o755)
    bad = preflight.fault(
        "node2: nvidia-smi failed: ",
        before=f'{ON_NODE2} export PATH="{folder}:$PATH"',
    )
    assert bad == ["node2"]
