"""A node with all trainer ranks is lost: the ranks continue on a spare one, with the same bits, or the command ends with 86."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from tests.system.disturbances import trained
from tests.system.kill_drill import differences
from tests.system.runs import ROOT, command, iterations, run, train_arguments
from tests.system.test_recovery import SETTINGS, recovery_s

pytestmark = pytest.mark.slow


@contextmanager
def nodes_for_ranks(count: int) -> Iterator[tuple[str, list[Any]]]:
    """Address of a cluster whose head has one CPU, for the engine, and its other nodes, each of which fits both ranks."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False},
        shutdown_at_exit=False,
    )
    try:
        yield cluster.address, [cluster.add_node(num_cpus=2) for _ in range(count)]
    finally:
        cluster.shutdown()


def has_ranks(node: Any) -> bool:
    (raylet,) = node.all_processes["raylet"]
    with suppress(psutil.Error):
        for process in psutil.Process(raylet.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if " ".join(process.cmdline()).startswith("ray::RankActor"):
                    return True
    return False


def lose_the_ranks_node(
    address: str, nodes: list[Any], run_dir: Path, *settings: str
) -> tuple[int, str, float]:
    """Exit code and output of a run whose ranks' node is killed after an iteration, and when that was."""
    arguments = train_arguments(run_dir, *SETTINGS, f"ray_address={address}", *settings)
    with open(run_dir.with_suffix(".log"), "w") as log:
        process = subprocess.Popen(command(*arguments), cwd=ROOT, stdout=log, stderr=log)
    deadline = time.monotonic() + 400
    while not trained(run_dir, 1):
        assert process.poll() is None, run_dir.with_suffix(".log").read_text()[-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (node,) = [node for node in nodes if has_ranks(node)]
    node.kill_all_processes(check_alive=False, allow_graceful=False)
    lost = time.time()
    try:
        code = process.wait(400)
    finally:
        process.kill()
    return code, run_dir.with_suffix(".log").read_text(), lost


def test_the_ranks_continue_on_a_spare_node(tmp_path):
    assert not ray.is_initialized()
    calm, run_dir = tmp_path / "calm", tmp_path / "run"
    with nodes_for_ranks(2) as (address, nodes):
        code, output, lost = lose_the_ranks_node(address, nodes, run_dir)
        assert code == 0, output[-4000:]
        arguments = train_arguments(calm, *SETTINGS, f"ray_address={address}")
        run(*arguments)
    assert differences(calm, run_dir) == []
    assert iterations(run_dir)[-1]["recovery/restarts"] >= 1
    print(f"recovered in {recovery_s(run_dir, lost):.1f} s")


def test_without_a_spare_node_the_command_ends_with_86(tmp_path):
    with nodes_for_ranks(1) as (address, nodes):
        code, output, _ = lose_the_ranks_node(
            address, nodes, tmp_path / "run", "recovery.placement_timeout_s=5"
        )
    assert code == 86, output[-4000:]
    last = output.strip().splitlines()[-1]
    assert "no other had its resources within recovery.placement_timeout_s = 5 s" in last
    assert "run the same command again" in last
