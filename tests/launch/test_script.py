"""Batch scripts: what the shell and sbatch read in them is what was given, whatever the text."""

import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.errors import UserError
from megatron_fipo.launch.script import Command, Job, body, render
from megatron_fipo.launch.settings import LaunchSettings
from tools.slurm_scripts import FOLDER, scripts

BARE = LaunchSettings()
FULL = LaunchSettings(
    nodes=4,
    gpus_per_node=4,
    account="ours",
    partition="gpu",
    time="1-2:30:00",
    exclude="node[1-4],node7",
    container="nvcr.io#ours/fipo:1",
    mounts=("/lustre:/lustre", "/data:/data"),
    env=("NCCL_DEBUG=INFO", "A=it's $HOME"),
    sbatch_lines=("--qos=high", '--comment="a b"'),
    interface="ib0",
    preflight=False,
    retries=0,
    start_timeout_s=60,
)
SHARED = LaunchSettings(gpus_per_node=0, cpus_per_node=4, venv="/envs/a b")
text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)


def header(script: str) -> str:
    """What is before the fixed body, and runs nothing."""
    return script.removesuffix(body("train"))


def values(script: str, *names: str) -> list[str]:
    """Variables and then arguments, as bash has them after the header."""
    shown = " ".join(f'"${name}"' for name in names)
    done = subprocess.run(
        ["bash", "-c", f"{header(script)}\nprintf '%s\\0' {shown} \"$@\""],
        capture_output=True,
        env={"PATH": "/usr/bin:/bin"},
        check=True,
    )
    return done.stdout.decode().split("\0")[:-1]


@pytest.mark.parametrize("command", get_args(Command))
def test_the_files_in_slurm_are_the_scripts_with_default_settings(command):
    name = f"{command}.sbatch"
    assert (FOLDER / name).read_text() == scripts()[name], "run python -m tools.slurm_scripts"


@pytest.mark.parametrize("command", get_args(Command))
@pytest.mark.parametrize("launch", [BARE, FULL, SHARED], ids=["bare", "full", "shared"])
def test_scripts_pass_bash_and_shellcheck(command, launch, tmp_path):
    path = tmp_path / "job.sbatch"
    path.write_text(render(Job(command, ("a b", "c=$d")), launch))
    assert subprocess.run(["bash", "-n", path], capture_output=True).stderr == b""
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    # SC2016: that nothing expands in the quotes is their purpose.
    done = subprocess.run(["shellcheck", "--exclude=SC2016", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_settings_become_options_of_sbatch():
    lines = render(Job("train", output="/runs/a b/%j.log", notice_s=900), FULL).splitlines()
    options = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    assert options == {
        "--job-name=megatron-fipo",
        "--nodes=4",
        "--ntasks-per-node=1",
        "--account=ours",
        "--partition=gpu",
        "--time=1-2:30:00",
        "--exclude=node[1-4],node7",
        '--output="/runs/a b/%j.log"',
        "--open-mode=append",
        "--gpus-per-node=4",
        "--signal=B:USR1@900",
        "--exclusive",
        "--mem=0",
        "--requeue",
        "--no-kill",
        "--qos=high",
        '--comment="a b"',
    }


def test_a_job_that_shares_its_nodes_is_not_exclusive():
    script = render(Job("train"), SHARED)
    assert "--cpus-per-task=4" in script
    assert "--exclusive" not in script
    assert "--gpus-per-node" not in script


def test_options_of_sbatch_come_before_the_first_command():
    lines = render(Job("train"), FULL).splitlines()
    first = next(index for index, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:])


def test_a_default_is_taken_from_the_environment_and_a_given_setting_is_not(monkeypatch):
    for script, expected in ((render(Job("train"), BARE), "theirs"), (render(Job("train"), FULL), "ib0")):
        done = subprocess.run(
            ["bash", "-c", f'{header(script)}\necho "$INTERFACE"'],
            env={"INTERFACE": "theirs", "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() == expected


@settings(max_examples=60, deadline=None)
@given(arguments=st.lists(text.filter(bool), min_size=1, max_size=4).map(tuple), value=text)
def test_the_shell_reads_arguments_and_variables_as_they_were_given(arguments, value):
    script = render(Job("train", arguments), replace(BARE, env=(f"GIVEN={value}",)))
    assert values(script, "GIVEN") == [value, *arguments]


@settings(max_examples=60, deadline=None)
@given(venv=text.filter(str.strip))
def test_no_value_adds_a_line_to_the_header(venv):
    try:
        script = render(Job("train", output=venv), replace(BARE, venv=venv))
    except (UserError, ValueError):
        return
    directives = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert len(directives) == len(
        [line for line in render(Job("train"), BARE).splitlines() if line.startswith("#SBATCH")]
    )
    (output,) = (line for line in directives if line.startswith("#SBATCH --output="))
    assert shlex.split(output.removeprefix("#SBATCH ")) == [f"--output={venv}"]
    assert values(script, "VENV") == [venv]


@pytest.mark.parametrize("output", ['a"b', "a\\b", "a\nb", "a\x7fb"])
def test_an_output_that_sbatch_would_read_differently_is_refused(output):
    with pytest.raises(UserError, match="cannot be written into a batch script"):
        render(Job("train", output=output), BARE)


def test_only_train_is_told_before_the_time_limit_and_only_ray_jobs_are_requeued():
    texts = scripts()
    assert re.findall("--signal.*", texts["train.sbatch"]) == ["--signal=B:USR1@600"]
    assert "--signal" not in texts["evaluate.sbatch"]
    assert "#SBATCH --no-requeue" in texts["convert.sbatch"]
    assert "#SBATCH --nodes=1\n" in texts["convert.sbatch"]


@pytest.mark.parametrize(
    ("code", "expected"), [(0, 0), (2, 2), (86, 86), (137, 137), (233, 86), (236, 86), (237, 237)]
)
def test_a_step_that_srun_could_not_start_is_a_part_of_the_cluster_that_was_lost(code, expected):
    function = re.search(r"^finished\(\) \{.*?^\}", body("train"), re.DOTALL | re.MULTILINE)
    script = f"{function[0]}\n(exit {code}) & finished $!"
    assert subprocess.run(["bash", "-c", script]).returncode == expected
