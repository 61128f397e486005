"""The batch script in bash, with a srun that runs the command here: strange values are refused, and none is executed."""

import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_fipo.errors import UserError
from megatron_fipo.launch.script import Job, render
from megatron_fipo.launch.settings import LaunchSettings
from tests.system.runs import ROOT

SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show && $2 == hostnames ]]; then [[ -z $3 ]] || echo "$3"; fi
"""
RECORDER = """#!/bin/bash
printf '%s\\0' "$@" >>"$RECORD"
exit 7
"""
SETTINGS = LaunchSettings(gpus_per_node=0, venv=None)


@pytest.fixture
def bash(tmp_path):
    """Runs a script as Slurm would, in an empty folder; every word that `megatron-fipo` got is in the file `record`."""
    programs = tmp_path / "bin"
    programs.mkdir()
    python = f'#!/bin/bash\nexec {sys.executable} "$@"\n'
    for name, content in (
        ("srun", SRUN),
        ("scontrol", SCONTROL),
        ("megatron-fipo", RECORDER),
        ("python", python),
    ):
        (programs / name).write_text(content)
        (programs / name).chmod(0o755)
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "examples").symlink_to(ROOT / "examples")

    def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        path = tmp_path / "job.sbatch"
        path.write_text(script)
        variables = {
            "PATH": f"{programs}:/usr/bin:/bin",
            "PYTHONPATH": str(ROOT),
            "RECORD": str(tmp_path / "record"),
            "SLURM_JOB_ID": "17",
            "SLURM_JOB_NODELIST": "here",
            **environment,
        }
        return subprocess.run(
            ["bash", path, *arguments], cwd=folder, env=variables, capture_output=True, text=True, timeout=120
        )

    return run


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RETRIES": "-1"}, "RETRIES=-1 must be a whole number"),
        ({"RETRIES": "three"}, "RETRIES=three must be a whole number"),
        ({"START_TIMEOUT": "a[$(touch planted)]"}, "must be a whole number of seconds above 0"),
        ({"START_TIMEOUT": "0"}, "START_TIMEOUT=0 must be"),
        ({"PREFLIGHT": "True"}, "PREFLIGHT=True must be true or false"),
        ({"VENV": "/a:b"}, "VENV=/a:b must not have a colon"),
        ({"VENV": "/absent"}, "VENV=/absent is no virtual environment on here"),
        ({"SLURM_JOB_NODELIST": ""}, "scontrol finds no nodes in SLURM_JOB_NODELIST="),
        ({"SLURM_JOB_ID": ""}, "this is a batch script of Slurm"),
    ],
)
def test_a_variable_that_cannot_be_is_refused_before_the_start(bash, tmp_path, environment, message):
    done = bash(render(Job("train", ("examples/countdown/fipo.yaml",)), SETTINGS), **environment)
    assert done.returncode == 2
    assert message in done.stderr
    assert list((tmp_path / "work").iterdir()) == [tmp_path / "work/examples"]


def test_a_python_without_the_package_is_one_sentence(bash, tmp_path):
    for content, message in (
        ("#!/bin/bash\nexit 0\n", "printed nothing on here; is its python that of megatron-fipo?"),
        ("#!/bin/bash\nexit 1\n", "ended with 1 on here; is megatron-fipo installed in image?"),
        ("#!/bin/bash\necho fipo_logs=/absent\n", "has no folder /absent outside the container"),
    ):
        (tmp_path / "bin/python").write_text(content)
        done = bash(render(Job("train", ("mine.yaml",)), SETTINGS), CONTAINER="image")
        assert done.returncode == 2
        assert message in done.stderr


def test_commands_in_values_are_not_executed(bash, tmp_path):
    planted = "$(touch planted)`touch planted`; touch planted & 'x' \"y\" \u2028"
    folder = "$(touch planted)`touch planted`; touch planted & 'x'"
    words = ("examples/countdown/fipo.yaml", f"run_dir={folder}", f"tracking.wandb_project={planted}")
    launch = replace(SETTINGS, env=(f"PLANTED={planted}",), interface="$(touch${IFS}x)")
    done = bash(render(Job("train", words), launch))
    # The recorder takes the part of a preflight that fails.
    assert done.returncode == 2, done.stderr
    logs = tmp_path / "work" / folder / "logs/17-0"
    assert (tmp_path / "record").read_text().split("\0")[:3] == ["preflight", "--run-dir", str(logs)]
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == sorted(["examples", folder])
    assert "exit code 2 would come again" in (logs / "job.log").read_text()


def test_a_variable_of_the_job_cannot_replace_a_setting():
    launch = replace(SETTINGS, env=("COMMAND=evaluate", "RETRIES=9", "INTERFACE=ib1"), retries=0)
    header = render(Job("train"), launch).partition("# Everything below")[0]
    show = 'echo "$COMMAND $RETRIES $INTERFACE"'
    done = subprocess.run(["bash", "-c", f"{header}\n{show}"], capture_output=True, text=True, env={})
    assert done.stdout == "train 0 ib1\n"


def test_text_that_no_file_can_have_is_refused():
    for job, launch in (
        (Job("train", ("a\udc80",)), SETTINGS),
        (Job("train"), replace(SETTINGS, env=("A=\udc80",))),
        (Job("train"), replace(SETTINGS, container="a\0b")),
    ):
        with pytest.raises(UserError, match="cannot be written into a batch script; use UTF-8 text"):
            render(job, launch)
