"""The first step of a job's attempt, on its first node: checks that need no other node, log folder, Ray's token.

    python -m megatron_fipo.node.prepare --retries N --nodes N -- COMMAND ARGUMENTS

Prints variables for the batch script. Exits with 2 after one sentence on stderr if the attempt cannot start.
"""

import argparse
import os
import platform
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_fipo.environment import package_versions
from megatron_fipo.errors import UserError, writing
from megatron_fipo.launch.inputs import load_run
from megatron_fipo.launch.needs import Allocation
from megatron_fipo.launch.shown import shown
from megatron_fipo.node import attempts
from megatron_fipo.node.requeue import Decision, begin
from megatron_fipo.node.shell import answer, exit_code
from megatron_fipo.node.slurm_variables import optional_number, text
from megatron_fipo.outputs import check_output_file, point_link
from megatron_fipo.run_dir import LOGS, run_folder
from megatron_fipo.secrecy import write_private

EVALUATION = Path("runs/evaluation")
"""Takes the role of run_dir for jobs of `evaluate`."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    job, restart = text(os.environ, "SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    run_dir = _run_dir(arguments.command, arguments.arguments, arguments.nodes)
    if "\n" in str(run_dir):
        raise UserError(
            f"run_dir {str(run_dir)!r} has a line break, which a batch script cannot read; choose another"
        )
    logs = run_dir / LOGS
    check_output_file(logs / f"{job}.json", "run_dir")
    history = attempts.read_history(logs, job)
    begun = begin(history, attempts.progress(run_dir), arguments.retries)
    if isinstance(begun, Decision):
        print(f"megatron-fipo: {begun.reason}", file=sys.stderr)
        attempts.write_history(logs, job, begun.history)
        if begun.code:
            return begun.code
        answer(finished=1)
        return 0
    folder = logs / f"{job}-{restart}"
    with writing(folder):
        (folder / "nodes").mkdir(parents=True, exist_ok=True)
        point_link(logs / "latest", folder.name)
        for leftover in logs.glob(f"{job}-*/.ray_token"):
            leftover.unlink()
        token = folder / ".ray_token"
        write_private(token, secrets.token_hex(32))
        (folder / "environment.txt").write_text(_describe(os.environ), encoding="utf-8")
    attempts.write_history(logs, job, begun)
    answer(finished=None, logs=folder, token=token)
    return 0


def _run_dir(command: str, words: list[str], nodes: int) -> Path:
    """The folder of the run. Refuses settings of `train` that are invalid, name no model or data, or need more than this
    job has.
    """
    if command != "train":
        return EVALUATION.absolute()
    parser = argparse.ArgumentParser(prog="megatron-fipo train", add_help=False)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--allow-change")
    known, _ = parser.parse_known_intermixed_args(words)
    return run_folder(load_run(known.config, known.overrides, allocation(os.environ, nodes)).run_dir)


def allocation(environment: Mapping[str, str], nodes: int) -> Allocation:
    """The nodes of this job, from the variables that Slurm sets on the first one."""
    gpus = optional_number(environment, "SLURM_GPUS_ON_NODE") or 0
    return Allocation(nodes, gpus, optional_number(environment, "SLURM_CPUS_ON_NODE"))


def _describe(environment: Mapping[str, str]) -> str:
    """Versions and variables that decide how the run works."""
    lines = [f"python {platform.python_version()} {sys.executable}"]
    lines += [f"{name} {version}" for name, version in package_versions().items()]
    lines += ["", *(f"{name}={value}" for name, value in shown(environment).items())]
    return "\n".join(lines) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m megatron_fipo.node.prepare")
    parser.add_argument("--retries", type=int, required=True)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("command")
    parser.add_argument("arguments", nargs="*")
    return parser


if __name__ == "__main__":
    sys.exit(exit_code(main))
