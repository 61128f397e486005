"""The steps of a job in containers: a recording srun in place of one with pyxis, which test machines do not have."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fipo.launch.script import Job, render
from megatron_fipo.launch.settings import LaunchSettings
from tests.system.runs import ROOT

SRUN = """#!/bin/bash
trap 'exit 0' USR2
line=$(printf '%s\\t' "$@")
echo "$line" >> "$RECORD" # one write, because steps run at the same time
while [[ $1 == -* ]]; do shift; done
case "$*" in
  *node.prepare*|*node.after*) exec "$@" ;;
  *node.ray_node*)
    [[ "$*" != *\\ head* ]] || echo 10.0.0.1:11265 > "$LOGS/ray_address"
    sleep 60 & wait ;;
  *node.joined*) until grep -q "ray_node.*worker" "$RECORD"; do sleep 0.05; done ;;
  *megatron-fipo\\ train*) exit "$DRIVER" ;;
  *megatron-fipo\\ preflight*) printf '%s' "$BAD" > "$LOGS/bad-nodes"; [[ -z $BAD ]] || exit 2 ;;
esac
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
  "show hostnames") printf 'n1\\nn2\\nn3\\n' ;;
  "show node") echo "NodeName=n2 NodeAddr=10.0.0.2 NodeHostName=n2" ;;
  "show job") echo "JobId=7 ExcNodeList=(null) x=y" ;;
  *) echo "$@" >> "$RECORD.scontrol" ;;
esac
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a script as Slurm does; returns the process and the arguments of each srun."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    record = tmp_path / "record"

    def start(
        settings: LaunchSettings, driver: int = 0, bad: str = ""
    ) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
        words = (
            str(ROOT / "examples/countdown/fipo.yaml"),
            f"run_dir={tmp_path}/run",
            f"model.path={ROOT}/examples/countdown/base-model",
        )
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        environment |= {
            "PATH": f"{tmp_path}/bin:{Path(sys.executable).parent}:/usr/bin:/bin",
            "PYTHONPATH": str(ROOT),
            "RECORD": str(record),
            "LOGS": f"{tmp_path}/run/logs/7-0",
            "DRIVER": str(driver),
            "BAD": bad,
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n[1-3]",
        }  # fmt: skip
        done = subprocess.run(
            ["bash"], input=render(Job("train", words), settings), cwd=tmp_path, env=environment, capture_output=True, text=True
        )  # fmt: skip
        lines = record.read_text().splitlines() if record.exists() else []
        return done, [line.split("\t")[:-1] for line in lines]

    return start


def command_of(step: list[str]) -> list[str]:
    return step[next(index for index, word in enumerate(step) if not word.startswith("-")) :]


def test_every_step_runs_in_the_container_of_the_job(run, tmp_path):
    done, steps = run(
        LaunchSettings(nodes=3, container="nvcr.io#ours/fipo:1", mounts=("/lustre:/lustre", "/data:/data"))
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *inside, last = steps
    assert command_of(last) == ["enroot", "remove", "--force", "pyxis_megatron-fipo-7"]
    assert not any(word.startswith("--container") for word in last)
    for step in inside:
        assert [word for word in step if word.startswith("--container")] == [
            "--container-image=nvcr.io#ours/fipo:1",
            "--container-name=megatron-fipo-7",
            f"--container-mounts={tmp_path}:{tmp_path},/lustre:/lustre,/data:/data",
            f"--container-workdir={tmp_path}",
        ]
    roles = [" ".join(command_of(step)) for step in inside]
    expected_roles = [
        "node.prepare",
        "preflight",
        "ray_node",
        "ray_node",
        "node.joined",
        "train",
        "node.after",
    ]
    assert len(roles) == len(expected_roles)
    assert all(any(expected in role for role in roles) for expected in expected_roles), roles
    assert any("head --peer=10.0.0.2" in role for role in roles)
    assert any("train" in role and role.endswith("ray_address=10.0.0.1:11265") for role in roles)
    (worker,) = (step for step in inside if "--address=10.0.0.1:11265" in step)
    assert {"--nodes=2", "--ntasks=2", "--exclude=n1"} <= set(worker)


def test_without_a_container_no_step_has_its_options(run):
    done, steps = run(LaunchSettings(nodes=3, preflight=False))
    assert done.returncode == 0, done.stdout + done.stderr
    assert not any(word.startswith("--container") for step in steps for word in step)
    assert not any("preflight" in step for step in steps)


def test_a_loss_requeues_without_the_lost_nodes(run, tmp_path):
    done, steps = run(LaunchSettings(nodes=3, preflight=False), driver=86)
    assert (tmp_path / "record.scontrol").read_text().splitlines() == ["requeue 7"], done.stdout + done.stderr
    assert any("--lost" in step for step in steps)


def test_bad_nodes_requeue_without_them_unless_all_are_bad(run, tmp_path):
    done, steps = run(LaunchSettings(nodes=3), bad="n2\n")
    commands = (tmp_path / "record.scontrol").read_text().splitlines()
    assert commands == ["requeue 7", "update JobId=7 ExcNodeList=n2"], done.stdout + done.stderr
    assert not any("train" in step for step in steps[1:])
    done, _ = run(LaunchSettings(nodes=3), bad="n1\nn2\nn3\n")
    assert done.returncode == 2
    assert len((tmp_path / "record.scontrol").read_text().splitlines()) == 2


def test_an_error_of_the_user_ends_the_job_with_its_code(run, tmp_path):
    done, _ = run(LaunchSettings(nodes=3, preflight=False), driver=2)
    assert done.returncode == 2
    assert not (tmp_path / "record.scontrol").exists()


def test_an_environment_without_the_package_is_named(run, tmp_path):
    other = tmp_path / "other/python"
    other.parent.mkdir()
    other.symlink_to(Path(sys.executable).resolve())  # the interpreter without its virtual environment
    path = f"PATH={tmp_path}/bin:{other.parent}:/usr/bin:/bin"
    done, steps = run(LaunchSettings(nodes=3, env=("PYTHONPATH=/absent", path)))
    assert done.returncode == 2
    assert "No module named 'megatron_fipo'" in done.stderr
    assert "is megatron-fipo installed in the environment of this job?" in done.stderr
    assert len(steps) == 1


def test_a_virtual_environment_that_is_not_there_is_named(run):
    done, _ = run(LaunchSettings(venv="/absent"))
    assert done.returncode == 2
    assert "VENV=/absent is no virtual environment on n1" in done.stderr
