"""The cluster itself: what nodes share and do not share, how they fail, and that nothing is left of them."""

import contextlib
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from tests.cluster.slurm import FOLDER_PREFIX, SlurmCluster, remove_leftovers
from tests.cluster.slurm_conf import LOGIN
from tests.system.runs import ROOT

pytestmark = pytest.mark.cluster

SEND = """
import socket, sys, time
me, address = sys.argv[1:]
if me == "node1":
    with socket.create_server((address, 5000)) as server, server.accept()[0] as peer:
        while peer.recv(1 << 16):
            pass
else:
    while True:
        try:
            peer = socket.create_connection((address, 5000))
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
    start = time.monotonic()
    peer.sendall(bytes(4 << 20))
    peer.shutdown(socket.SHUT_WR)
    peer.recv(1)
    print("seconds", time.monotonic() - start)
"""


def script(cluster: SlurmCluster, *lines: str) -> Path:
    """A batch script of these lines."""
    path = cluster.folder / f"{uuid.uuid4().hex}.sbatch"
    path.write_text("\n".join(["#!/bin/bash", *lines, ""]))
    return path


def run(cluster: SlurmCluster, *lines: str, nodes: int = 2, gpus: int = 0) -> str:
    """Output of a job on `nodes` nodes with `gpus` GPUs each."""
    options = [f"--nodes={nodes}", *([f"--gpus-per-node={gpus}"] if gpus else [])]
    job = cluster.submit(script(cluster, *lines), options=options)
    cluster.wait(job, "COMPLETED", timeout=60)
    return cluster.output(job)


def wait_for_output(cluster: SlurmCluster, job: int, text: str, times: int) -> None:
    cluster.wait_until(lambda: cluster.output(job).count(text) >= times, f"{text} from job {job}")


def test_a_step_runs_on_all_nodes(cluster: SlurmCluster) -> None:
    answers = run(cluster, "srun bash -c 'echo $(hostname) $(hostname -I)'").splitlines()
    assert sorted(answers) == [f"{name} {cluster.address(name)}" for name in cluster.names]


def test_nodes_share_all_but_tmp_and_shared_memory(cluster: SlurmCluster) -> None:
    word = uuid.uuid4().hex
    files = f"/tmp/{word} /dev/shm/{word} {cluster.folder}/{word}"
    found = run(
        cluster, f"srun --nodes=1 --nodelist=node1 touch {files}", f"srun -l ls {files} 2>/dev/null || true"
    )
    assert sorted(found.splitlines()) == [
        f"0: /dev/shm/{word}",
        f"0: /tmp/{word}",
        f"0: {cluster.folder}/{word}",
        f"1: {cluster.folder}/{word}",
    ]
    assert not Path("/tmp", word).exists()
    assert not Path("/dev/shm", word).exists()
    assert (cluster.local_folder("node1") / word).exists()


def test_a_process_belongs_to_one_node(cluster: SlurmCluster) -> None:
    job = cluster.submit(script(cluster, "srun bash -c 'echo ready; sleep 1234'"), options=["--nodes=2"])
    wait_for_output(cluster, job, "ready", 2)
    for name in cluster.names:
        commands = [process.cmdline() for process in cluster.processes(name)]
        assert commands.count(["sleep", "1234"]) == 1
        assert [listener.port for listener in cluster.listening_sockets(name)].count(6818) == 1
    assert ["sleep", "1234"] not in [process.cmdline() for process in cluster.processes(LOGIN)]


def test_a_job_is_requeued_after_a_power_cut(cluster: SlurmCluster) -> None:
    job = cluster.submit(
        script(cluster, "srun bash -c 'echo run $SLURM_RESTART_COUNT; sleep 1234'"),
        options=["--nodes=2", "--open-mode=append"],
    )
    wait_for_output(cluster, job, "run", 2)
    lost = cluster.processes("node2")
    cluster.kill_node("node2")
    assert not any(process.is_running() for process in lost)
    cluster.wait_for_requeue(job, 1, timeout=120)
    cluster.start_node("node2")
    cluster.start_now(job)
    wait_for_output(cluster, job, "run 1", 2)


@pytest.mark.parametrize("code", [85, 86])
def test_exit_codes_that_requeue(cluster: SlurmCluster, code: int) -> None:
    job = cluster.submit(script(cluster, f'[ "$SLURM_RESTART_COUNT" = 1 ] || exit {code}'))
    cluster.wait_for_requeue(job, 1, timeout=60)
    cluster.start_now(job)
    assert cluster.wait(job, "COMPLETED", timeout=60).restarts == 1


def test_other_exit_codes_end_the_job(cluster: SlurmCluster) -> None:
    job = cluster.submit(script(cluster, "exit 2"))
    ended = cluster.wait(job, "FAILED", timeout=60)
    assert (ended.exit_code, ended.restarts) == (2, 0)


def test_signal_reaches_the_batch_script(cluster: SlurmCluster) -> None:
    job = cluster.submit(
        script(cluster, "trap 'echo signalled; exit' USR1", "echo ready", "sleep 1234 & wait")
    )
    wait_for_output(cluster, job, "ready", 1)
    cluster.signal(job, "USR1", batch=True)
    cluster.wait(job, "COMPLETED", timeout=60)
    assert "signalled" in cluster.output(job)


def test_slow_link(cluster: SlurmCluster) -> None:
    program = cluster.folder / "send.py"
    program.write_text(SEND)
    send = f"srun bash -c '{sys.executable} {program} $(hostname) {cluster.address('node1')}'"

    def seconds() -> float:
        return float(run(cluster, send).split()[-1])

    fast = seconds()
    cluster.slow_link("node2", "tbf", "rate", "10mbit", "burst", "32k", "latency", "1s")
    slow = seconds()
    cluster.restore_link("node2")
    assert slow > 8 * fast  # 4 MiB at 10 Mbit/s take 3.4 s
    assert slow > 8 * seconds()


def test_clusters_beside_each_other(cluster: SlurmCluster, cluster_folder: Path) -> None:
    with SlurmCluster(cluster_folder, nodes=3, cpus=2, gpus=2) as other:
        remove_leftovers(cluster_folder)
        shown = run(other, "srun bash -c 'echo $(hostname) $CUDA_VISIBLE_DEVICES'", nodes=3, gpus=2)
        assert sorted(shown.splitlines()) == ["node1 0,1", "node2 0,1", "node3 0,1"]
        assert len(run(cluster, "srun hostname").split()) == 2


def traces(folder: Path) -> list[str]:
    """What of a cluster is visible on this machine: processes, mounts, network devices, its folder."""
    links = subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout
    commands = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    return [
        *(line for line in commands if str(folder) in line),
        *(line for line in Path("/proc/mounts").read_text().splitlines() if str(folder) in line),
        *(line.split()[0] for line in links.splitlines() if line.startswith(("bridge", "node"))),
        *([str(folder)] if folder.exists() else []),
    ]


def start_orphans(cluster: SlurmCluster) -> list[psutil.Process]:
    """Start processes that outlive their job's step, on both nodes and the login node; returns all of the cluster's."""
    for node in (*cluster.names, LOGIN):
        cluster.exec_on(node, ["setsid", "--fork", "sleep", "1234"])
    return [process for node in (*cluster.names, LOGIN) for process in cluster.processes(node)]


def test_nothing_is_left_after_an_interrupt(cluster_folder: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt), SlurmCluster(cluster_folder) as cluster:
        processes = start_orphans(cluster)
        raise KeyboardInterrupt
    assert len(processes) >= 9
    assert not any(process.is_running() for process in processes)
    assert traces(cluster.folder) == []


OWNER = """
import sys
from pathlib import Path
from tests.cluster.slurm import SlurmCluster
from tests.cluster.test_slurm import start_orphans
with SlurmCluster(Path(sys.argv[1])) as cluster:
    print(cluster.folder, *(process.pid for process in start_orphans(cluster)), flush=True)
    sys.stdin.read()
"""


def test_nothing_is_left_of_a_killed_owner(cluster_folder: Path) -> None:
    command = [sys.executable, "-c", OWNER, str(cluster_folder)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        folder, *pids = owner.stdout.readline().split()
        processes = [psutil.Process(int(pid)) for pid in pids]
        owner.send_signal(signal.SIGKILL)
    gone, alive = psutil.wait_procs(processes, timeout=60)
    assert len(gone) >= 9
    assert not alive
    assert Path(folder).name.startswith(FOLDER_PREFIX)
    deadline = time.monotonic() + 60
    while traces(Path(folder)) and time.monotonic() < deadline:
        remove_leftovers(cluster_folder)
    assert traces(Path(folder)) == []
