"""The `study` command: arms over seeds, one table of all runs with intervals, and a page."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_fipo.cli.arguments import Subparsers, add_command, path
from megatron_fipo.cli.streams import say
from megatron_fipo.errors import UserError

if TYPE_CHECKING:
    from megatron_fipo.config import Config
    from megatron_fipo.environment import Machine
    from megatron_fipo.study.compare import Comparison
    from megatron_fipo.study.grid import Check, PlannedRun
    from megatron_fipo.study.schema import StudyConfig

STUDY_HELP = """\
    Compare arms, such as objectives, over seeds: train every combination of task, arm, grid values and seed,
    and write one table of all runs, means with 95 % intervals, paired differences, and a page.

    All combinations are checked as by `train --dry-run` before anything runs. Each run is a process
    `megatron-fipo train` with a folder of its own. A run that fails is recorded with its reason, and the others
    continue. Ctrl-C stops all runs with their state saved; the same command continues the study, and skips what
    is complete. `megatron-fipo config study` explains the settings.

    Results are written to the output_dir of the study: results.csv and results.json (every run), results.md
    (means and differences), results.html, and samples.md (responses before and after). --report writes them again,
    or compares folders of any runs.

    examples:
      megatron-fipo study examples/studies/objectives.yaml --quick
      megatron-fipo study examples/studies/objectives.yaml seeds=[1,2,3] parallel_runs=1
      megatron-fipo study --report runs/studies/objectives --output docs/results/objectives
      megatron-fipo study --report runs/mine-1 runs/mine-2 --output runs/comparison
"""


def add_study(commands: Subparsers) -> None:
    """Add `study` to the command line."""
    command = add_command(commands, "study", "compare arms over seeds, with intervals", STUDY_HELP)
    command.add_argument("study", metavar="STUDY", nargs="?", help="YAML file of a study")
    command.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        default=[],
        help="settings of the study that override the file, for example seeds=[1,2,3]",
    )
    command.add_argument(
        "--quick", action="store_true", help="the smaller study of the file's section `quick`"
    )
    command.add_argument("--dry-run", action="store_true", help="check and list all runs, and stop")
    command.add_argument(
        "--allow-mixed-versions",
        action="store_true",
        help="accept runs of different versions of the package or its libraries; the results show them",
    )
    command.add_argument(
        "--report",
        metavar="DIR",
        type=path,
        nargs="+",
        help="train nothing: compare the runs of a study's folder, or folders of any runs",
    )
    command.add_argument(
        "--output",
        metavar="FOLDER",
        type=path,
        help="folder for the results of --report (default: the study's folder)",
    )
    command.set_defaults(handler=run_study)


def run_study(arguments: argparse.Namespace) -> int:
    """Run or report a study. Returns the exit code."""
    if arguments.report:
        if arguments.study is not None or arguments.quick or arguments.dry_run:
            raise UserError("--report trains nothing; give it without STUDY, --quick and --dry-run")
        return _report(arguments)
    if arguments.study is None:
        raise UserError("give the YAML file of a study, or --report with folders of runs")
    if arguments.output is not None:
        raise UserError("--output is of --report; a study writes to its output_dir")
    return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    from megatron_fipo.config import load_config
    from megatron_fipo.environment import this_machine
    from megatron_fipo.run_dir import run_folder
    from megatron_fipo.study.grid import plan_runs, shrunk
    from megatron_fipo.study.launch import check_folder
    from megatron_fipo.study.outcome import StudyFolder
    from megatron_fipo.study.schema import StudyConfig

    study = shrunk(load_config(arguments.study, arguments.overrides, StudyConfig, note=say), arguments.quick)
    machine = None if arguments.dry_run else this_machine()
    runs = plan_runs(study, _check(machine), quick=arguments.quick)
    if arguments.dry_run:
        folder = StudyFolder(run_folder(study.output_dir))
        check_folder(folder, runs, allow_mixed_versions=arguments.allow_mixed_versions)
        for run in runs:
            print(run.name)
        print(f"{len(runs)} runs in {study.output_dir}, {study.parallel_runs} at one time")
        return 0
    assert machine is not None
    if machine.gpus and study.parallel_runs > 1:
        raise UserError(
            f"parallel_runs={study.parallel_runs}: runs would share the GPUs of this machine; set parallel_runs=1"
        )
    return _train(study, runs, arguments.allow_mixed_versions)


def _check(machine: "Machine | None") -> "Check":
    """What `train --dry-run` checks, and with a machine what `train` checks of it."""
    from megatron_fipo.cli.case_options import read_case
    from megatron_fipo.cli.plan import check_fit
    from megatron_fipo.config import validate
    from megatron_fipo.families.registry import read_architecture

    def check(config: "Config") -> None:
        validate(config, read_architecture(Path(config.model.path)), None if config.ray_address else machine)
        check_fit(read_case(config))

    return check


def _train(study: "StudyConfig", runs: "list[PlannedRun]", allow_mixed_versions: bool) -> int:
    from megatron_fipo.run_dir import run_folder
    from megatron_fipo.study.launch import claim, execute
    from megatron_fipo.study.write import write_results

    lock = claim(study, runs, allow_mixed_versions=allow_mixed_versions)
    try:
        if lock.note is not None:
            say(lock.note)
        stopped = execute(study, runs, say)
        folder = run_folder(study.output_dir)
        comparison = write_results([folder], folder, allow_mixed_versions=allow_mixed_versions)
    finally:
        lock.release()
    _print(comparison, folder)
    if stopped is not None:
        return stopped
    failed = [result for result in comparison.results if not result.counts]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(runs)} runs are not complete, for example {failed[0].name}: {failed[0].outcome.reason}; "
            "the same command tries them again"
        )
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from megatron_fipo.study.write import is_study, write_results

    folders, output = arguments.report, arguments.output
    if output is None:
        if len(folders) > 1 or not is_study(folders[0]):
            raise UserError("--report of runs needs --output, the folder of the results")
        output = folders[0]
    _print(write_results(folders, output, allow_mixed_versions=arguments.allow_mixed_versions), output)
    return 0


def _print(comparison: "Comparison", output: Path) -> None:
    from megatron_fipo.study.table import to_markdown
    from megatron_fipo.study.write import PAGE

    print(to_markdown(comparison), end="")
    print(f"wrote {output / PAGE}, the same as results.csv, .json and .md, and responses as samples.md")
