"""FIPO, DAPO and GRPO on the same problems, launched as one NeMo-Run experiment.

Install NeMo-Run in a virtual environment of its own (its pins conflict with vLLM's), and name the environment that trains:

    python -m venv .venv-launch && .venv-launch/bin/pip install -e '.[launch]'
    .venv-launch/bin/python examples/nemo_run/launch.py --venv .venv                        # one by one, on this machine
    .venv-launch/bin/python examples/nemo_run/launch.py --venv .venv --slurm --nodes 2 --gpus-per-node 0 --dry-run
    .venv-launch/bin/python examples/nemo_run/launch.py --venv .venv --slurm --nodes 2 --gpus-per-node 0

With --slurm each run is a job: the batch script of `megatron-fipo launch slurm`, which starts Ray on all nodes of the job, saves
the state before the time limit and is requeued while it makes progress. NeMo-Run submits it, and records it with its logs:
`nemo experiment status fipo`, `nemo experiment logs fipo`.
"""

import argparse

import nemo_run as run

from megatron_fipo.launch.nemo_run import local_task, slurm_task
from megatron_fipo.launch.settings import LaunchSettings

OBJECTIVES = ("fipo", "dapo", "grpo")


def main() -> None:
    arguments = parse()
    with run.Experiment("fipo") as experiment:
        for objective in OBJECTIVES:
            config = f"examples/countdown/{objective}.yaml"
            overrides = [f"run_dir=runs/compare/{objective}", *arguments.overrides]
            if arguments.slurm:
                settings = LaunchSettings(
                    nodes=arguments.nodes,
                    gpus_per_node=arguments.gpus_per_node,
                    account=arguments.account,
                    partition=arguments.partition,
                    time=arguments.time,
                    venv=arguments.venv,
                    job_name=f"fipo-{objective}",
                )
                task, executor = slurm_task(config, overrides, settings)
            else:
                task, executor = local_task(config, overrides, arguments.venv)
            experiment.add(task, executor=executor, name=objective)
        if arguments.dry_run:
            experiment.dryrun()
        else:
            # On one machine the runs share the cores, so one starts after the other.
            experiment.run(
                sequential=not arguments.slurm, detach=arguments.slurm, tail_logs=not arguments.slurm
            )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--venv", required=True, help="virtual environment that trains")
    parser.add_argument("--slurm", action="store_true", help="submit jobs instead of running on this machine")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--account")
    parser.add_argument("--partition")
    parser.add_argument("--time", help="time limit of each attempt")
    parser.add_argument("--dry-run", action="store_true", help="print what would run")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="settings of every run")
    return parser.parse_args()


if __name__ == "__main__":
    main()
