"""The batch script of a job: #SBATCH lines and settings, then a body that is the same in every script."""

import re
from dataclasses import dataclass
from importlib.resources import files
from shlex import quote
from typing import Literal

from megatron_fipo.errors import UserError
from megatron_fipo.launch.settings import LaunchSettings

Command = Literal["train", "evaluate", "convert"]
BODIES: dict[Command, str] = {"train": "ray_job.sh", "evaluate": "ray_job.sh", "convert": "one_node.sh"}
DEFAULT_NOTICE_S = 600
_PLAIN = re.compile(r"[\w.@+:/,=%\[\]-]+", re.ASCII)
_UNUSABLE = re.compile(r"[^\s'=]*[\0\ud800-\udfff]+[^\s']*")
"""A word with a character that no script can have."""
_USAGE: dict[Command, str] = {
    "train": "slurm/train.sbatch CONFIG [key=value ...]",
    "evaluate": "slurm/evaluate.sbatch HF_DIR [CONFIG] [key=value ...]",
    "convert": "slurm/convert.sbatch to-hf SRC DST",
}
_SUMMARY: dict[Command, str] = {
    "train": "Trains or resumes a run on all nodes of the job: megatron-fipo train CONFIG [key=value ...]",
    "evaluate": "Evaluates a model on all nodes of the job: megatron-fipo evaluate HF_DIR [CONFIG] [key=value ...]",
    "convert": "Converts a model on one node: megatron-fipo convert to-megatron|to-hf SRC DST",
}


@dataclass(frozen=True)
class Job:
    """One command as a job."""

    command: Command
    arguments: tuple[str, ...] = ()
    """Of the command. None: they are those of the script."""
    output: str = "%x-%j.log"
    """File for the output of all attempts, with sbatch's patterns."""
    notice_s: int = DEFAULT_NOTICE_S
    """Seconds from SIGUSR1 to the time limit."""


def render(job: Job, settings: LaunchSettings) -> str:
    """The batch script. Raises UserError for a value that cannot be written into it.

    A setting that has its default takes the environment variable of its name, if that is set.
    """
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {line}" for line in _directives(job, settings)),
        "#",
        f"# {_SUMMARY[job.command]}",
        f"#   sbatch --nodes=N --account=A {_USAGE[job.command]}",
        "# The values below can also be given as environment variables: CONTAINER=image sbatch ...",
        "",
        *(f"export {name}={quote(value)}" for name, value in map(_split, settings.env)),
        *_variables(job.command, settings),
    ]
    if job.arguments:
        lines.append(f"set -- {' '.join(map(quote, job.arguments))}")
    header = "\n".join(lines)
    unusable = _UNUSABLE.search(header)
    if unusable is not None:
        raise UserError(f"{unusable[0]!r} cannot be written into a batch script; use UTF-8 text without NUL")
    return f"{header}\n\n{body(job.command)}"


def body(command: Command) -> str:
    """The part of the script that does not depend on settings."""
    return files("megatron_fipo.launch").joinpath(BODIES[command]).read_text(encoding="utf-8")


def _directives(job: Job, settings: LaunchSettings) -> list[str]:
    """Options of sbatch."""
    on_one_node = job.command == "convert"
    options: dict[str, object] = {
        "--job-name": settings.job_name,
        "--nodes": 1 if on_one_node else settings.nodes,
        "--ntasks-per-node": 1,
        "--account": settings.account,
        "--partition": settings.partition,
        "--time": settings.time,
        "--exclude": settings.exclude,
        "--output": job.output,
        "--open-mode": "append",
        "--gpus-per-node": None if on_one_node else settings.gpus_per_node or None,
        "--cpus-per-task": settings.cpus_per_node,
    }
    if job.command == "train":
        options["--signal"] = f"B:USR1@{job.notice_s}"
    flags = [] if settings.cpus_per_node else ["--exclusive", "--mem=0"]
    flags += ["--no-requeue"] if on_one_node else ["--requeue", "--no-kill"]
    given = [f"{name}={_value(name, value)}" for name, value in options.items() if value is not None]
    return [*given, *flags, *settings.sbatch_lines]


def _variables(command: Command, settings: LaunchSettings) -> list[str]:
    """The settings as variables of the shell."""
    default = LaunchSettings()
    values = {
        "CONTAINER": (settings.container, default.container),
        "MOUNTS": (",".join(settings.mounts), ",".join(default.mounts)),
        "VENV": (settings.venv, default.venv),
    }
    if command != "convert":
        values |= {
            "INTERFACE": (settings.interface, default.interface),
            "PREFLIGHT": (str(settings.preflight).lower(), str(default.preflight).lower()),
            "RETRIES": (str(settings.retries), str(default.retries)),
            "START_TIMEOUT": (str(settings.start_timeout_s), str(default.start_timeout_s)),
        }
    lines = [
        f"{name}=${{{name}-{usual or ''}}}" if value == usual else f"{name}={quote(value or '')}"
        for name, (value, usual) in values.items()
    ]
    return lines if command == "convert" else [f"COMMAND={command}", *lines]


def _split(variable: str) -> tuple[str, str]:
    name, _, value = variable.partition("=")
    return name, value


def _value(name: str, value: object) -> str:
    """The value of an option as sbatch reads it in a #SBATCH line."""
    text = str(value)
    if _PLAIN.fullmatch(text):
        return text
    if '"' in text or "\\" in text or not text.isprintable():
        raise UserError(
            f"{name}={text!r} cannot be written into a batch script; choose a name without quotes, "
            "backslashes and control characters"
        )
    return f'"{text}"'
