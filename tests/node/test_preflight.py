"""The command on several nodes, which are processes of this machine."""

import json
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.node.fake_smi import HEALTHY, install_smi

# This machine may be busy, and its few ports and folders belong to all processes.
PATIENT = ("--check-timeout-s=100", "--network-timeout-s=100", "--pair-timeout-s=60")
LENIENT = ("--min-open-files=1024", "--min-tmp-gib=0", "--min-shm-gib=0", "--xid-hours=0")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Nodes:
    """Nodes of one preflight; those that are not started are missing."""

    def __init__(self, names: str) -> None:
        self.names = names
        self._head = f"127.0.0.1:{free_port()}"
        self._started: list[subprocess.Popen] = []

    def start(
        self, name: str, *options: str, env: dict[str, str] | None = None, open_files: int | None = None
    ):
        """Start the command on a node, with further options, environment and limit of open files."""
        rank = self.names.split(",").index(name)
        command = ["-m", "megatron_fipo.cli", "preflight", "--nodes", self.names, "--rank", str(rank)]
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if open_files is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, hard))
        try:
            process = subprocess.Popen(
                [sys.executable, *command, "--head", self._head, *PATIENT, *LENIENT, *options],
                env={**os.environ, **(env or {})},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        self._started.append(process)
        return process

    def kill(self) -> None:
        for process in self._started:
            process.kill()
            process.wait()


@pytest.fixture
def nodes():
    made = []

    def make(names: str) -> Nodes:
        made.append(Nodes(names))
        return made[-1]

    yield make
    for each in made:
        each.kill()


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code and output."""
    output, _ = process.communicate(timeout=250)
    return process.returncode, output


@pytest.mark.slow
def test_healthy_nodes(nodes, tmp_path: Path):
    run, report, bad = tmp_path / "run", tmp_path / "report.json", tmp_path / "bad"
    group = nodes("alpha,beta,gamma")
    others = [group.start(name, f"--run-dir={run}") for name in ("beta", "gamma")]
    head = group.start("alpha", f"--run-dir={run}", f"--json={report}", f"--bad-nodes={bad}")
    code, output = ended(head)
    assert code == 0, output
    assert "3 nodes, no faults" in output
    assert [ended(other) for other in others] == [(0, ""), (0, "")]
    assert bad.read_text() == ""
    assert list(run.iterdir()) == []
    found = json.loads(report.read_text())
    assert found["canary"] == {"alpha": None, "beta": None, "gamma": None}
    measured = {
        (link["a"], link["b"]): link for facts in found["network"].values() for link in facts["links"]
    }
    assert set(measured) == {("alpha", "beta"), ("alpha", "gamma"), ("beta", "gamma")}
    assert all(link["gb_per_s"] > 0 for link in measured.values())
    assert {clock["node"] for clock in found["network"]["alpha"]["clocks"]} == {"beta", "gamma"}
    assert found["network"]["alpha"]["all_reduce_gb_per_s"] > 0


@pytest.mark.slow
def test_each_planted_fault_names_its_node(nodes, tmp_path: Path):
    run, bad = f"--run-dir={tmp_path / 'run'}", tmp_path / "bad"
    other_ray = tmp_path / "packages" / "ray-1.2.3.dist-info"
    other_ray.mkdir(parents=True)
    (other_ray / "METADATA").write_text("Metadata-Version: 2.1\nName: ray\nVersion: 1.2.3\n")
    path = f"{install_smi(tmp_path / 'bin', HEALTHY.replace(' 0,', ' 5,'))}:{os.environ['PATH']}"
    group = nodes("alpha,beta,gamma,delta,absent")
    group.start("beta", run, env={"PATH": path})
    group.start("gamma", run, open_files=600)
    group.start(
        "delta",
        f"--run-dir={tmp_path / 'elsewhere'}",
        env={"PYTHONPATH": f"{other_ray.parent}:{os.environ.get('PYTHONPATH', '')}"},
    )
    head = group.start("alpha", run, f"--bad-nodes={bad}", "--join-timeout-s=45")
    code, output = ended(head)
    assert code == 2, output
    for sentence in (
        "absent did not answer in 45 s",
        "beta: GPU 0 has 5 uncorrected memory errors",
        "beta has 0 GPUs by torch and 1 by nvidia-smi, most nodes have 0 GPUs by torch",
        "gamma: a process may open 600 files (ulimit -n), 1024 are needed",
        "delta has ray 1.2.3, most nodes have ray",
        f"delta does not share {tmp_path / 'run'} with alpha",
    ):
        assert output.count(sentence) == 1, output
    assert "6 faults" in output, output
    assert bad.read_text().split() == ["beta", "gamma", "delta", "absent"]


def test_a_node_without_a_head_says_so(nodes):
    code, output = ended(nodes("alpha,beta").start("beta", "--join-timeout-s=2"))
    assert code == 2
    assert "node beta cannot reach the head alpha at 127.0.0.1:" in output
    assert "in 2 s; is the preflight running there" in output
    assert "frame #" not in output


@pytest.mark.parametrize("option", ["--json", "--bad-nodes"])
def test_a_file_that_cannot_be_written_is_refused_before_the_checks(nodes, tmp_path: Path, option):
    code, output = ended(nodes("alpha").start("alpha", f"{option}={tmp_path}", "--check-timeout-s=0.001"))
    assert code == 2
    assert output == f"megatron-fipo: {option} {tmp_path} is a folder; give the name of a file\n"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--min-tmp-gib=-1", "--min-tmp-gib must be at least 0, not -1.0"),
        (
            "--dtype=bfloat",
            "--dtype must be one of bfloat16, float32, not 'bfloat' (did you mean 'bfloat16'?)",
        ),
    ],
)
def test_a_limit_outside_its_range(nodes, option, message):
    code, output = ended(nodes("alpha").start("alpha", option))
    assert code == 2
    assert message in output


def test_a_port_that_is_taken(nodes):
    with socket.create_server(("127.0.0.1", 0)) as server:
        group = nodes("alpha,beta")
        group._head = f"127.0.0.1:{server.getsockname()[1]}"
        code, output = ended(group.start("alpha"))
    assert code == 2
    assert "the head alpha cannot listen on 127.0.0.1:" in output
    assert "choose another address or port by --head" in output
