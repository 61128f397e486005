"""Tasks of NeMo-Run experiments: a training run as the batch script of `launch slurm`, or as a command on this machine.

    with run.Experiment("fipo") as experiment:
        task, executor = slurm_task("mine.yaml", ["optimizer.lr=2e-6"], LaunchSettings(nodes=16))
        experiment.add(task, executor=executor, name="train")
        experiment.run(detach=True)

NeMo-Run wraps a task in a batch script of its own, which runs ours as one step on the job's first node: our `#SBATCH` options
become the executor's, and everything else is the same bytes. Its pins conflict with vLLM's, so it is installed in a virtual
environment of its own (`pip install 'megatron-fipo[launch]'`); `LaunchSettings.venv` names the one that trains.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_fipo.errors import UserError, writing
from megatron_fipo.launch.settings import LaunchSettings
from megatron_fipo.launch.slurm import make_script

if TYPE_CHECKING:
    import nemo_run

SCRIPT = "job.sbatch"
"""In the run's folder of logs."""
RESERVED = "/nemo_run"
"""NeMo-Run replaces this in its script by the folder of the experiment."""
OWN_OPTIONS = ("output", "job-name")
"""NeMo-Run sets them, so that it finds the job and its output again."""
COMMAND = "megatron-fipo"


def slurm_task(
    config: str,
    overrides: Sequence[str],
    settings: LaunchSettings,
    options: Sequence[str] = (),
    *,
    dry_run: bool = False,
) -> "tuple[nemo_run.Script, nemo_run.SlurmExecutor]":
    """A training run as a Slurm job; writes its script to run_dir/logs. `options` of `train`, such as --allow-change.

    Raises `UserError` as `launch slurm` does, and if NeMo-Run is not installed. The weights and the data are not looked
    for if `dry_run`.
    """
    run = import_nemo_run()
    script, logs = make_script(config, overrides, options, settings, dry_run=dry_run)
    path = logs / SCRIPT
    if RESERVED in f"{path}{os.getcwd()}":
        raise UserError(
            f"NeMo-Run replaces {RESERVED} in paths, and run_dir or the current directory contains it ({path}, {os.getcwd()}); "
            "rename the folder"
        )
    parameters = executor_parameters(script)
    with writing(path):
        logs.mkdir(parents=True, exist_ok=True)
        path.write_text(script, encoding="utf-8")
    executor = run.SlurmExecutor(
        account=settings.account,
        job_name_prefix=f"{settings.job_name}-",
        time=None,
        additional_parameters=parameters,
        srun_args=srun_arguments(os.getcwd()),
        packager=run.Packager(),
        tunnel=run.LocalTunnel(job_dir=""),
    )
    return run.Script(path=shlex.quote(str(path)), entrypoint="bash"), executor


def local_task(
    config: str, overrides: Sequence[str], venv: str | None = None, options: Sequence[str] = ()
) -> "tuple[nemo_run.Script, nemo_run.LocalExecutor]":
    """A training run on this machine, with the package of the virtual environment `venv` (None: of this process)."""
    run = import_nemo_run()
    command = Path(venv or sys.prefix).absolute() / "bin" / COMMAND
    if not command.is_file():
        raise UserError(
            f"there is no {command}; install the package in that environment, or name another as venv"
        )
    task = run.Script(path="train", args=[config, *overrides, *options], entrypoint=str(command))
    return task, run.LocalExecutor(packager=run.Packager())


def srun_arguments(folder: str) -> list[str]:
    """Options of the one step, which runs our script in `folder`; ours starts a step on each node itself.

    NeMo-Run writes them into its script without quotes. The last --chdir counts; NeMo-Run's is an empty folder.
    """
    options = ["--nodes=1", "--ntasks=1", "--overlap", "--no-kill", "--cpu-bind=none"]
    return [*options, f"--chdir={shlex.quote(folder)}"]


def executor_parameters(script: str) -> dict[str, str | bool]:
    """The `#SBATCH` options of `script`, by NeMo-Run's names; options without a value are True. Raises `UserError`.

    `--signal=B:...` loses its `B:`, which means the batch script alone: that is NeMo-Run's here, and ours is a step.
    """
    parameters: dict[str, str | bool] = {}
    # As sbatch does: its lines end with \n only, and its options with the first command.
    comments = takewhile(lambda line: line.startswith("#"), script.split("\n"))
    for line in comments:
        if not line.startswith("#SBATCH "):
            continue
        try:
            options = shlex.split(line)[1:]
        except ValueError:
            raise UserError(f"a quote is not closed in {line!r}; close it in sbatch_lines") from None
        for option in options:
            name, equals, value = option.removeprefix("--").partition("=")
            if not option.startswith("--"):
                raise UserError(
                    f"NeMo-Run takes long options of sbatch only, not {option!r} of the line {line!r}; "
                    "write it as --name=value"
                )
            if name not in OWN_OPTIONS:
                parameters[name.replace("-", "_")] = value if equals else True
    signal = parameters.get("signal")
    if isinstance(signal, str):
        parameters["signal"] = signal.removeprefix("B:")
    return parameters


def import_nemo_run():
    """The package. Raises `UserError` if it cannot be imported."""
    try:
        import nemo_run
    except ImportError as error:
        raise UserError(
            f"NeMo-Run cannot be imported ({error}); install it in a virtual environment of its own: "
            "pip install 'megatron-fipo[launch]'"
        ) from None
    return nemo_run
