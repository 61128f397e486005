"""The command and environment of Ray on a node, its folder, and the end of everything that it started."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.errors import UserError
from megatron_fipo.node.log_copy import LogCopy
from megatron_fipo.node.ports import Ports
from megatron_fipo.node.ray_node import (
    Place,
    make_session_folder,
    ray_command,
    ray_environment,
    wait_for_token,
)
from tests.system.runs import ROOT

PLACE = Place("n1", "10.0.0.1", "ib0", Ports(11264), Path("/tmp/fipo-7-0"))


def test_every_port_of_ray_is_of_the_block():
    for head in (None, "10.0.0.9:11265"):
        command = ray_command(PLACE, head, {"SLURM_CPUS_ON_NODE": "96"})
        ports = [int(word.partition("=")[2]) for word in command if "port=" in word]
        assert len(ports) == len(set(ports)) == (10 if head is None else 8)
        assert all(11264 < port < 11264 + 1024 for port in ports)
        assert "--node-ip-address=10.0.0.1" in command
        assert "--num-cpus=96" in command
        assert not any(word.startswith("--num-gpus") for word in command)


def test_variables_of_the_launcher_are_removed_and_interfaces_set():
    environment = {
        "PMI_RANK": "3",
        "SLURM_PROCID": "3",
        "PMIX_ID": "1",
        "HOME": "/root",
        "NCCL_SOCKET_IFNAME": "mine",
    }
    own = ray_environment(PLACE, environment)
    assert {
        "HOME": "/root",
        "NCCL_SOCKET_IFNAME": "mine",
        "GLOO_SOCKET_IFNAME": "ib0",
        "VLLM_HOST_IP": "10.0.0.1",
    }.items() <= own.items()
    assert own["TMPDIR"] == "/tmp/fipo-7-0/tmp"
    assert not any(name.startswith(("PMI", "SLURM")) for name in own)


@given(st.integers(1, 10**9), st.integers(0, 10**4))
def test_paths_of_sockets_are_short(job, restart):
    longest = Path("/x" * 16, f"fipo-{job}-{restart}", "ray")  # a TMPDIR of 32 bytes
    assert len(os.fsencode(longest)) < 60


def test_a_folder_of_another_user_is_refused_with_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "fipo-7-0").symlink_to("elsewhere")
    monkeypatch.setattr("megatron_fipo.node.ray_node.LONGEST_BASE", 1000)
    with pytest.raises(UserError, match="fipo-7-0: File exists; remove it, or set TMPDIR"):
        make_session_folder({"SLURM_JOB_ID": "7", "TMPDIR": str(tmp_path)})
    assert not any((tmp_path / "elsewhere").iterdir())


def test_the_folder_is_private_and_replaces_those_of_earlier_attempts(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_fipo.node.ray_node.LONGEST_BASE", 200)
    environment = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1", "TMPDIR": str(tmp_path)}
    for name in ("fipo-7-0", "fipo-8-0"):
        (tmp_path / name / "ray").mkdir(parents=True)
    folder = make_session_folder(environment)
    assert folder == tmp_path / "fipo-7-1"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fipo-7-1", "fipo-8-0"]


def test_a_tmpdir_that_is_too_long_or_absent_is_not_used(tmp_path):
    for base in (f"{tmp_path}/{'x' * 60}", "/absent"):
        folder = make_session_folder({"SLURM_JOB_ID": "1234567890", "TMPDIR": base})
        assert folder == Path("/tmp/fipo-1234567890-0")
        (folder / "tmp").rmdir()
        folder.rmdir()


def test_a_token_that_this_node_does_not_see_means_that_run_dir_is_not_shared(tmp_path):
    with pytest.raises(UserError, match="put run_dir on a file system that all nodes share"):
        wait_for_token(tmp_path / ".ray_token", threading.Event(), timeout_s=0.1)


def test_logs_are_copied_as_they_grow(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "events").mkdir(parents=True)
    copy = LogCopy(source, target)
    (source / "a.log").write_text("one\n")
    (source / "events/b.log").write_text("")
    copy.sync()
    assert (target / "a.log").read_text() == "one\n"
    assert (target / "events/b.log").exists()
    with (source / "a.log").open("a") as file:
        file.write("two\n")
    (target / "a.log").write_text("ONE\n")  # what was copied is not copied again
    copy.sync()
    assert (target / "a.log").read_text() == "ONE\ntwo\n"
    (source / "a.log").write_text("3\n")  # begun again, as a rotated log
    copy.sync()
    assert (target / "a.log").read_text() == "3\n"


TREE = """
import subprocess, sys, time
from megatron_fipo.node.processes import adopt_orphans, end_children
adopt_orphans()
# An orphan: its parent ends at once, and it ignores SIGTERM in a session of its own.
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
start = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {code!r}], start_new_session=True)"
subprocess.run([sys.executable, "-c", start])
first = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("started", flush=True)
sys.stdin.readline()
end_children(first)
print("ended", flush=True)
time.sleep(600)
"""


def test_the_end_reaches_orphans_in_other_sessions_and_nothing_else():
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    tree = subprocess.Popen(
        [sys.executable, "-c", TREE], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert {tree.stdout.readline(), tree.stdout.readline()} == {"up\n", "started\n"}
        processes = psutil.Process(tree.pid).children(recursive=True)
        assert len(processes) == 2
        tree.stdin.write("\n")
        tree.stdin.flush()
        assert tree.stdout.readline() == "ended\n"
        assert not psutil.Process(tree.pid).children()
        assert bystander.poll() is None
    finally:
        tree.kill()
        bystander.kill()
        tree.wait()
        bystander.wait()


def test_a_process_ends_with_its_parent():
    code = (
        "import subprocess, sys; from megatron_fipo.node.processes import end_with_parent; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], preexec_fn=end_with_parent); "
        "print(child.pid, flush=True); sys.stdin.readline()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    child = psutil.Process(int(parent.stdout.readline()))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 30
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
