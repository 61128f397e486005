"""The folder of a run: its checkpoints, and the state of the training loop at each.

    run_dir/config.yaml, inputs.json          the resolved configuration, and what its paths contained
    run_dir/checkpoints/iteration_000005/     one checkpoint
        manifest.json                         every file's size and sha256, written last
        weights/                              model and optimizer (Megatron-Core's distributed checkpoint)
        rng/                                  random states of each rank
        hf/                                   config.json and tokenizer of the model
        config.yaml, inputs.json              the settings, and what their paths contained
        loop.json, tokens.npz                 the state of the loop
    run_dir/checkpoints/latest                link to the newest
    run_dir/metrics.jsonl, samples.jsonl      the logs
    run_dir/model/                            the trained model in Hugging Face format
    run_dir/report.html
    run_dir/logs/                             of the jobs that trained here

A checkpoint is written under a name that starts with a dot and renamed when it is complete. Before it is
removed it gets such a name again. So every visible checkpoint is complete; one that is not was damaged by
something else, and is refused.
"""

import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_fipo.checkpoint import manifest
from megatron_fipo.checkpoint.companions import copy_companions
from megatron_fipo.checkpoint.manifest import (
    FileRecord,
    check_file,
    lasting,
    list_files,
    read_manifest,
    record_file,
    sync,
    write_manifest,
)
from megatron_fipo.config import Config, save_config
from megatron_fipo.environment import run_versions
from megatron_fipo.errors import UserError, writing
from megatron_fipo.outputs import point_link
from megatron_fipo.run_dir import CONFIG_FILE, LOGS
from megatron_fipo.run_dir.evaluation_names import MAIN, evaluation_metric
from megatron_fipo.run_dir.inputs import INPUTS_FILE, RunInputs, read_inputs, write_inputs
from megatron_fipo.run_dir.lock import LOCK, RunLock
from megatron_fipo.run_dir.loop_state import (
    LOOP_FILE,
    TOKENS_FILE,
    LoopState,
    read_loop_state,
    write_loop_state,
)
from megatron_fipo.run_dir.metrics_log import read_metrics
from megatron_fipo.run_dir.retention import checkpoints_to_remove
from megatron_fipo.run_dir.settings_change import accepted_changes, refuse_unknown

LATEST = "latest"
NAME = re.compile(r"iteration_(\d{6,})")
DRIVER_FILES = (LOOP_FILE, TOKENS_FILE, CONFIG_FILE, INPUTS_FILE, "hf/")
"""The files of a checkpoint that the driver writes; the ranks write the others."""


@dataclass(frozen=True)
class PendingSave:
    """A checkpoint that is being written."""

    target: Path
    """Its folder, once it is complete."""
    partial: Path
    """Its folder until then.

    The name is unique, so a writer that outlived its run cannot disturb another save.
    """


class RunDirectory:
    """The folder of a run. Call `claim` first; only one process at a time can use the folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._lock: RunLock | None = None
        self._config: Config | None = None
        self._inputs: RunInputs | None = None

    def prompt_time(self) -> datetime | None:
        """When the run that a `claim` would resume first started; None for a new run and an old record."""
        owner = self._owner()
        stored = None if owner is None else read_inputs(owner).prompt_time
        return None if stored is None else datetime.fromisoformat(stored)

    def claim(self, config: Config, inputs: RunInputs, allow_change: Sequence[str] = ()) -> list[str]:
        """Lock the folder for this run until the process ends, and create it if it does not exist.

        Returns one line for each setting that differs from the newest checkpoint's and is permitted by
        `allow_change`, and one for changed evaluation sets. Files are compared by content. One more line if the folder
        has no real lock (`RunLock.note`). Raises `UserError` if the folder belongs to a run with other settings or inputs,
        is in use by another process, or contains other files,
        and if its newest checkpoint is not complete.
        """
        refuse_unknown(allow_change)
        stored = self.path / CONFIG_FILE
        with writing(self.path):
            if self.path.exists():
                _refuse_other_folder(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._lock or RunLock(self.path)
            self._refuse_copied_link()
            owner = self._owner()
            allowed: list[str] = []
            if owner:
                allowed = accepted_changes(owner, config, inputs, allow_change)
            save_config(config, stored)  # before anything else, because this file marks the folder as a run's
            write_inputs(self.path, inputs)
            self.checkpoints.mkdir(exist_ok=True)
            self.remove_leftovers()
            self._point_to_latest()
        self._config, self._inputs = config, inputs
        return [*allowed, *filter(None, [self._lock.note])]

    def latest(self) -> Path | None:
        """The newest checkpoint. Raises `UserError` if it is not complete or has another format."""
        found = self._visible()
        if not found:
            return None
        try:
            read_manifest(found[-1])
        except UserError as error:
            raise self._damaged(found[-1], [str(error)]) from None
        return found[-1]

    def previous(self, checkpoint: Path) -> Path | None:
        """The newest complete checkpoint that is older than `checkpoint`."""
        for path in reversed(self._visible()):
            if _number(path) < _number(checkpoint):
                try:
                    read_manifest(path)
                except UserError:
                    continue
                return path
        return None

    def checkpoint(self, iteration: int) -> Path:
        """Where the state after this iteration is or will be."""
        return self.checkpoints / _name(iteration)

    def has(self, iteration: int) -> bool:
        """Whether the state after this iteration has been saved."""
        return self.checkpoint(iteration).exists()

    def refuse_damaged(self, checkpoint: Path, problems: Sequence[str]) -> None:
        """Raise `UserError`, with the fix, if `check_files` found `problems` with a checkpoint's files."""
        if problems:
            raise self._damaged(checkpoint, problems)

    def _damaged(self, checkpoint: Path, problems: Sequence[str]) -> UserError:
        more = f" (and {len(problems) - 1} more of its files)" if len(problems) > 1 else ""
        older = self.previous(checkpoint)
        fix = (
            f"to resume from {older.name}"
            if older
            else "to start the run again, because there is no older checkpoint"
        )
        return UserError(
            f"checkpoint {checkpoint} is damaged: {problems[0]}{more}; restore it from a copy, "
            f"or remove that folder {fix}"
        )

    def load_state(self, checkpoint: Path) -> LoopState:
        """The loop state of a checkpoint. Raises `UserError` if it is damaged."""
        try:
            state = read_loop_state(checkpoint)
        except ValueError as error:
            raise self._damaged(checkpoint, [str(error)]) from None
        if _name(state.iteration) != checkpoint.name:
            raise self._damaged(checkpoint, [f"its {LOOP_FILE} is of iteration {state.iteration}"])
        return state

    def begin_save(self, state: LoopState) -> PendingSave:
        """Make a hidden folder with all files of the driver; the ranks then write into its weights/ and rng/.

        `has(state.iteration)` must be false. Raises `UserError` if writing fails; then the hidden folder is
        removed.
        """
        config, inputs = self._claimed()
        target = self.checkpoint(state.iteration)
        pending = PendingSave(target, target.with_name(f".{target.name}.{secrets.token_hex(4)}"))
        try:
            with writing(target):
                for folder in ("weights", "rng", "hf"):
                    (pending.partial / folder).mkdir(parents=True)
                copy_companions(Path(config.model.path), pending.partial / "hf")
                write_loop_state(pending.partial, state)
                save_config(config, pending.partial / CONFIG_FILE)
                write_inputs(pending.partial, inputs)
        except BaseException:
            self.abandon(pending)
            raise
        return pending

    def commit(self, pending: PendingSave, files: Mapping[str, FileRecord]) -> Path:
        """Complete a checkpoint: write its manifest and give it its name. Then apply the retention settings.

        `files` records at least what the ranks wrote, by path relative to the checkpoint. Raises `UserError`
        if writing fails, or if the files on disk differ from the records; then this checkpoint is removed,
        and the others are unchanged.
        """
        config, _ = self._claimed()
        target, partial = pending.target, pending.partial
        try:
            with writing(target):
                own = [name for name in list_files(partial) if name.startswith(DRIVER_FILES)]
                files = {**files, **{name: record_file(partial / name) for name in own}}
                _refuse_incomplete(partial, files)
                write_manifest(partial, files, _info(_number(target), config))
                if target.exists():
                    raise UserError(
                        f"{target} appeared while that checkpoint was being written; move it away"
                    )
                partial.rename(target)
                sync(self.checkpoints)
        except BaseException:
            self.abandon(pending)
            raise
        with writing(self.checkpoints):
            self._point_to_latest()
            self._retain(config)
        return target

    def abandon(self, pending: PendingSave) -> None:
        """Remove the files of a checkpoint that will not be completed."""
        shutil.rmtree(pending.partial, ignore_errors=True)

    def _claimed(self) -> tuple[Config, RunInputs]:
        if self._config is None or self._inputs is None or self._lock is None:
            raise RuntimeError("call claim() before saving")
        self._lock.check()
        return self._config, self._inputs

    def _owner(self) -> Path | None:
        """The folder whose settings the run must keep.

        Its newest checkpoint; without one, the run's own folder if an iteration has been logged.
        """
        _list_anew(self.checkpoints)
        checkpoint = self.latest()
        if checkpoint is None:
            trained = any(record.kind == "iteration" for record in read_metrics(self.path))
            return self.path if trained else None
        records = read_manifest(checkpoint).files
        files = [CONFIG_FILE, *(name for name in records if name == INPUTS_FILE)]  # before 0.2 there was none
        problems = [check_file(checkpoint / name, records.get(name)) for name in files]
        self.refuse_damaged(checkpoint, [problem for problem in problems if problem])
        return checkpoint

    def _visible(self) -> list[Path]:
        """Everything with the name of a checkpoint, oldest first."""
        if not self.checkpoints.is_dir():
            return []
        return sorted((path for path in self.checkpoints.iterdir() if NAME.fullmatch(path.name)), key=_number)

    def remove_leftovers(self) -> None:
        """Remove what killed runs and lost ranks left partly written or partly removed.

        The lock ensures that no other run uses it.
        """
        for path in self.checkpoints.glob(".iteration_*"):
            shutil.rmtree(path, ignore_errors=True)

    def _refuse_copied_link(self) -> None:
        """Raise `UserError` if `latest` is a folder: the run was copied with links followed."""
        latest, found = self.checkpoints / LATEST, self._visible()
        if latest.is_symlink() or not latest.exists():
            return
        if not latest.is_dir():
            raise UserError(f"{latest} is a file and not a link; remove it")
        fix = (
            f"remove it if it is a copy of {found[-1].name}"
            if found
            else "rename it to iteration_NNNNNN, with the iteration of its loop.json"
        )
        raise UserError(
            f"{latest} is a folder and not a link, as in a run that was copied with links followed; {fix}"
        )

    def _point_to_latest(self) -> None:
        """Point `latest` to the newest checkpoint, atomically."""
        found = self._visible()
        point_link(self.checkpoints / LATEST, found[-1].name if found else None)

    def _retain(self, config: Config) -> None:
        keep = config.checkpoint
        # From the log, because a checkpoint may be evaluated after it was saved, also by a resumed run.
        accuracies = {
            record.iteration: record.values.get(evaluation_metric(MAIN))
            for record in read_metrics(self.path)
            if record.kind == "evaluation"
        }
        checkpoints = [(_number(path), accuracies.get(_number(path))) for path in self._visible()]
        for iteration in checkpoints_to_remove(checkpoints, keep.keep_last, keep.keep_best, keep.keep_every):
            hidden = self.checkpoints / f".{_name(iteration)}.{secrets.token_hex(4)}"
            self.checkpoint(iteration).rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)


def _list_anew(folder: Path) -> None:
    """Let this node list a folder anew: it may show what was there a minute ago, until it changes the folder itself.

    Else a run that continues on another node could resume from an older checkpoint.
    """
    probe = folder / f".{secrets.token_hex(4)}"
    with suppress(OSError):  # there is no such folder, or it cannot be written, which `claim` reports
        probe.touch()
        probe.unlink()


def _name(iteration: int) -> str:
    return f"iteration_{iteration:06d}"


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("iteration_"))


def _refuse_other_folder(run_dir: Path) -> None:
    """Raise `UserError` if an existing folder is neither a run's nor what a first start leaves that fails."""
    if (run_dir / LOOP_FILE).exists() or (run_dir / manifest.NAME).exists():
        raise UserError(
            f"run_dir {run_dir} is a checkpoint; give the folder of its run, {run_dir.parent.parent}, to resume it"
        )
    locked = (run_dir / LOCK).exists()
    if (run_dir / CONFIG_FILE).exists() and (locked or (run_dir / "checkpoints").is_dir()):
        return

    def left_by_a_start(path: Path) -> bool:
        if path.name == "checkpoints":
            return path.is_dir() and not any(path.iterdir())
        if path.name == LOGS or path.name.startswith(LOCK):
            return True
        return locked and path.name.startswith((CONFIG_FILE, INPUTS_FILE))

    if not all(left_by_a_start(path) for path in run_dir.iterdir()):
        raise UserError(f"run_dir {run_dir} has other files than those of a run; choose another folder")


def _info(iteration: int, config: Config) -> dict[str, Any]:
    """What a run's manifests record in addition to the files."""
    return {"iteration": iteration, "layout": asdict(config.parallel), "versions": run_versions()}


def _refuse_incomplete(partial: Path, files: Mapping[str, FileRecord]) -> None:
    """Raise `UserError` unless the files on disk are exactly the recorded ones.

    This node may see files of other nodes late, so it looks again for a while.
    """

    def different() -> list[str]:
        sizes = [name for name, record in files.items() if _size(partial / name) != record.size]
        return sorted({*sizes, *(set(list_files(partial)) - files.keys())})

    if wrong := lasting(different, manifest.NODE_CACHE_S):
        more = f" (nor are {len(wrong) - 1} other files)" if len(wrong) > 1 else ""
        raise UserError(
            f"{partial / wrong[0]} is not what the ranks wrote there{more}, so the checkpoint is discarded; "
            "check that all ranks write to one shared file system, then run the same command again"
        )


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
