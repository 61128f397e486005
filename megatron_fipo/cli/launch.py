"""The command `launch`: a training run as a job of a scheduler."""

import argparse
import sys
from dataclasses import fields

from megatron_fipo.cli.arguments import Parser, Subparsers, add_command, add_overrides, option_help, path
from megatron_fipo.cli.streams import say
from megatron_fipo.errors import UserError
from megatron_fipo.launch.settings import LaunchSettings

LAUNCH_HELP = """\
    Submit a training run to Slurm. The batch script starts Ray on all nodes and runs `megatron-fipo train` on
    the first. Before the time limit the run saves its state; the job is then requeued and continues, as long
    as it makes progress. --dry-run prints the script: exactly what is submitted otherwise.

    Settings of the job come from --settings FILE.yaml and the options below, which win; `megatron-fipo config
    launch` explains them. The settings of the run are checked first. A job whose nodes have fewer GPUs than
    the run needs is refused, and one whose model folder or data files are not there. The shell's environment
    is passed on to the job.

    Output is written to run_dir/logs: a folder per attempt, and `latest`.

    examples:
      megatron-fipo launch slurm examples/qwen2.5-32b/fipo.yaml --nodes 16 --account ours --time 4:00:00 \\
          model.path=models/qwen2.5-32b
      megatron-fipo launch slurm mine.yaml --settings cluster.yaml --dry-run optimizer.lr=2e-6
      megatron-fipo launch slurm mine.yaml --container nvcr.io#ours/fipo:1 --mount /lustre:/lustre
"""
NEMO_RUN_HELP = """\
    Train as a task of a NeMo-Run experiment: the batch script of `launch slurm` with SlurmExecutor, or with
    --local the command on this machine with LocalExecutor. Options and settings are those of `launch slurm`.

    NeMo-Run pins packages that vLLM needs newer. Install it in a virtual environment of its own, with
    pip install 'megatron-fipo[launch]', run this command there, and name the environment that trains by
    --venv or --container. examples/nemo_run/launch.py launches several runs in one experiment.

    --dry-run prints NeMo-Run's script. Ours, which it runs, is written to run_dir/logs/job.sbatch.

    examples:
      megatron-fipo launch nemo-run mine.yaml --venv /shared/venv --nodes 16 --account ours --dry-run
      megatron-fipo launch nemo-run examples/countdown/fipo.yaml --venv .venv --local
"""
OPTIONS = {
    "nodes": "N",
    "gpus_per_node": "N",
    "cpus_per_node": "N",
    "account": "NAME",
    "partition": "NAME",
    "time": "LIMIT",
    "exclude": "NODES",
    "job_name": "NAME",
    "container": "IMAGE",
    "venv": "DIR",
    "interface": "NAME",
    "preflight": "BOOL",
    "retries": "N",
    "start_timeout_s": "SECONDS",
    "signal_notice_s": "SECONDS",
}
"""Settings with one value, and the name of the value in the help text."""
REPEATED = {
    "mounts": ("--mount", "SOURCE:TARGET"),
    "env": ("--env", "NAME=VALUE"),
    "sbatch_lines": ("--sbatch-line", "OPTION"),
}
FLAGS = {"start_timeout_s": "--start-timeout", "signal_notice_s": "--signal-notice"}


def add_launch(commands: Subparsers) -> None:
    launch = add_command(commands, "launch", "train as a job of a scheduler", LAUNCH_HELP)
    launchers = launch.add_subparsers(title="launchers", metavar="LAUNCHER", required=True)
    slurm = add_command(launchers, "slurm", "a job of Slurm", LAUNCH_HELP)
    _add_settings(slurm, "print the script and submit nothing")
    slurm.set_defaults(handler=run_slurm)
    nemo_run = add_command(
        launchers, "nemo-run", "an experiment of NeMo-Run around the job of Slurm", NEMO_RUN_HELP
    )
    _add_settings(nemo_run, "print NeMo-Run's script and submit nothing")
    nemo_run.add_argument("--name", default="megatron-fipo", help="title of the experiment")
    nemo_run.add_argument(
        "--local", action="store_true", help="run the command on this machine instead (LocalExecutor)"
    )
    nemo_run.set_defaults(handler=run_nemo_run)


def _add_settings(command: Parser, dry_run: str) -> None:
    """Arguments of all launchers: those of the run, and the settings of the job. `dry_run` explains --dry-run."""
    command.add_argument("config", metavar="CONFIG", help="YAML file as for train")
    add_overrides(command, "optimizer.lr=1e-5 run_dir=runs/mine")
    command.add_argument("--settings", metavar="FILE", type=path, help="YAML file with settings of the job")
    command.add_argument("--dry-run", action="store_true", help=dry_run)
    command.add_argument("--allow-change", metavar="KEY[,KEY]", help="as for train")
    docs = option_help(LaunchSettings)
    for name, value in OPTIONS.items():
        flag = FLAGS.get(name, f"--{name.replace('_', '-')}")
        command.add_argument(flag, dest=name, metavar=value, default=argparse.SUPPRESS, help=docs[name])
    for name, (flag, value) in REPEATED.items():
        text = f"{docs[name]} May be repeated."
        command.add_argument(
            flag, dest=name, metavar=value, action="append", default=argparse.SUPPRESS, help=text
        )


def run_slurm(arguments: argparse.Namespace) -> int:
    from megatron_fipo.launch.slurm import launch, make_script

    script, logs = make_script(
        arguments.config,
        arguments.overrides,
        _train_options(arguments),
        _settings(arguments),
        dry_run=arguments.dry_run,
    )
    if arguments.dry_run:
        sys.stdout.write(script)
        return 0
    job = launch(script, logs)
    print(job)
    say(f"submitted job {job}; its logs: {logs}/slurm-{job}.log, and {logs}/latest once it runs")
    return 0


def run_nemo_run(arguments: argparse.Namespace) -> int:
    from megatron_fipo.launch.nemo_run import import_nemo_run, local_task, slurm_task

    run = import_nemo_run()
    settings, options, dry_run = _settings(arguments), _train_options(arguments), arguments.dry_run
    if settings.container is None and settings.venv in (None, sys.prefix):
        raise UserError(
            "this command runs in the environment of NeMo-Run, which has no vLLM; name the one that trains by --venv"
            " or --container"
        )
    if arguments.local:
        task, executor = local_task(arguments.config, arguments.overrides, settings.venv, options)
    else:
        task, executor = slurm_task(arguments.config, arguments.overrides, settings, options, dry_run=dry_run)
    with run.Experiment(arguments.name) as experiment:
        experiment.add(task, executor=executor, name="train")
        if dry_run:
            experiment.dryrun()
        else:
            experiment.run(detach=not arguments.local, tail_logs=arguments.local)
    # The experiment waits for a local run when its context ends.
    ran_here = arguments.local and not dry_run
    if ran_here and not all(job.state.name == "SUCCEEDED" for job in experiment.jobs):
        say("the run did not succeed; its messages are above")
        return 1
    return 0


def _settings(arguments: argparse.Namespace) -> LaunchSettings:
    from megatron_fipo.launch.slurm import load_settings

    names = {item.name for item in fields(LaunchSettings)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    return load_settings(arguments.settings, given)


def _train_options(arguments: argparse.Namespace) -> list[str]:
    return ["--allow-change", arguments.allow_change] if arguments.allow_change else []
