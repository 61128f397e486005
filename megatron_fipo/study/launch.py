"""A study from its lock to its last run."""

from collections.abc import Callable, Sequence

from megatron_fipo.config import differences, load_stored_config, save_config
from megatron_fipo.environment import run_versions
from megatron_fipo.errors import UserError, listed, writing
from megatron_fipo.run_dir import CONFIG_FILE, run_folder
from megatron_fipo.run_dir.lock import RunLock
from megatron_fipo.study.grid import PlannedRun
from megatron_fipo.study.outcome import StudyFolder, outcome_of
from megatron_fipo.study.processes import Job, Processes
from megatron_fipo.study.results import MIXED, confirmed, read_result, stored_versions, version_differences
from megatron_fipo.study.schema import StudyConfig

Log = Callable[[str], None]
THREADS = {"OMP_NUM_THREADS": "1"}
"""Of the driver of a run, whose numerical work is small. Ray gives ranks and engines on CPUs one thread each anyway."""


def claim(study: StudyConfig, runs: Sequence[PlannedRun], *, allow_mixed_versions: bool) -> RunLock:
    """Make the study's folder, lock it until the process ends, and store the settings of the study.

    Raises UserError, before anything is written, if another process has the folder, or it has runs that are not part of this
    study, of other settings or, unless allowed, of other versions.
    """
    folder = StudyFolder(run_folder(study.output_dir))
    with writing(folder.path):
        folder.path.mkdir(parents=True, exist_ok=True)
        lock = RunLock(folder.path, "output_dir")
    check_folder(folder, runs, allow_mixed_versions=allow_mixed_versions)
    save_config(study, folder.settings)
    return lock


def check_folder(folder: StudyFolder, runs: Sequence[PlannedRun], *, allow_mixed_versions: bool) -> None:
    """Raise UserError for runs in the folder with which these cannot be compared. The folder need not exist."""
    _refuse_other_runs(folder, runs)
    for run in runs:
        _refuse_other_settings(folder, run)
    if not allow_mixed_versions:
        found = {run.name: stored_versions(folder.run_dir(run.name)) for run in runs}
        different = version_differences([run_versions(), *filter(None, found.values())])
        if different:
            raise UserError(
                f"{folder.path} has runs of other versions than this process ({'; '.join(different)}); {MIXED}"
            )


def _refuse_other_runs(folder: StudyFolder, runs: Sequence[PlannedRun]) -> None:
    """Their results would be dropped."""
    others = sorted(set(folder.ended()) - {run.name for run in runs})
    if others:
        raise UserError(
            f"{folder.path} has {len(others)} runs that are not part of this study ({listed(others, 3)}); keep their arms and seeds "
            f"in it, choose another output_dir, or remove their files in {folder.path}/outcomes"
        )


def _refuse_other_settings(folder: StudyFolder, run: PlannedRun) -> None:
    stored = folder.run_dir(run.name) / CONFIG_FILE
    if not stored.exists():
        return
    before = load_stored_config(stored)
    changed = [key for key in differences(before, run.config) if key != "run_dir"]
    if changed:
        raise UserError(
            f"{stored.parent} was made with other settings ({listed(changed, 5)}); restore them, choose another output_dir, or"
            " remove that folder"
        )


def _is_complete(folder: StudyFolder, run: PlannedRun) -> bool:
    found = read_result(folder.run_dir(run.name), folder.outcome(run.name), name=run.name, seed=run.seed)
    return confirmed(found).outcome.status == "complete"


def execute(study: StudyConfig, runs: Sequence[PlannedRun], log: Log) -> int | None:
    """Run what is not complete. Returns the exit code if the study was asked to stop, else None.

    Call `claim` first. A run that fails is logged and recorded; the others continue.
    """
    folder = StudyFolder(run_folder(study.output_dir))
    todo = [run for run in runs if not _is_complete(folder, run)]
    numbers = {run.name: number for number, run in enumerate(runs, 1)}
    if len(todo) < len(runs):
        log(f"{len(runs) - len(todo)} of {len(runs)} runs are complete already")
    for run in todo:
        save_config(run.config, folder.config(run.name))
    limit = study.time_limit_minutes
    processes = Processes(study.parallel_runs, None if limit is None else limit * 60, THREADS)
    jobs = [Job(run.name, folder.config(run.name), folder.log(run.name)) for run in todo]

    def place(job: Job) -> str:
        return f"run {numbers[job.name]} of {len(runs)}, {job.name}"

    for ended in processes.run(jobs, lambda job: log(f"{place(job)}: started")):
        outcome = outcome_of(
            ended.code,
            ended.job.log,
            stopped=processes.signal is not None,
            limit_minutes=limit if ended.timed_out else None,
        )
        folder.save_outcome(ended.job.name, outcome)
        reason = f": {outcome.reason}" if outcome.reason else ""
        log(f"{place(ended.job)}: {outcome.status} after {ended.seconds:,.0f} s{reason}")
    return processes.exit_code
