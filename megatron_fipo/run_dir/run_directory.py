"""A run's folder: which checkpoints it holds, and where the loop stood at each.

    run_dir/config.yaml                       the resolved configuration
    run_dir/checkpoints/iteration_000005/     one checkpoint
        manifest.json                         every file's size and sha256, written last
        weights/                              model and optimizer (Megatron-Core's distributed checkpoint)
        rng/                                  random states of each rank
        hf/                                   config.json and tokenizer of the model
        config.yaml, loop.json                the settings, and where the loop stood
    run_dir/checkpoints/latest                link to the newest
    run_dir/metrics.jsonl, samples.jsonl      what happened
    run_dir/model/                            the trained model in Hugging Face format
    run_dir/report.html

A checkpoint is written under a name that starts with a dot and renamed when it is whole, and gets such a name again before it is
removed. So every folder that shows is complete; one that is not was damaged by something else, and is refused.
"""

import fcntl
import json
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from megatron_fipo.checkpoint.companions import copy_companions
from megatron_fipo.checkpoint.manifest import (
    FileRecord,
    check_file,
    list_files,
    read_manifest,
    record_file,
    sync,
    write_manifest,
)
from megatron_fipo.config import Config, load_config, save_config
from megatron_fipo.errors import UserError, writing
from megatron_fipo.run_dir.metrics_log import read_metrics
from megatron_fipo.run_dir.retention import to_remove
from megatron_fipo.run_dir.settings_change import refuse_changes, refuse_unknown

LATEST = "latest"
LOCK = ".lock"
LOOP_STATE = "loop.json"
CONFIG = "config.yaml"
NAME = re.compile(r"iteration_(\d{6,})")
OWN_FILES = (LOOP_STATE, CONFIG, "hf/")
"""What the driver writes into a checkpoint; the ranks write the rest."""


@dataclass
class LoopState:
    """Everything the loop itself must know to go on; weights, optimizer and random states lie beside it."""

    iteration: int = 0
    """Iterations completed."""
    weight_version: int = 0
    """Version that the engines serve: one per iteration."""
    rollout: dict[str, Any] = field(default_factory=dict)
    """Position in the training data, waiting groups and unfinished responses; JSON values."""


@dataclass(frozen=True)
class PendingSave:
    """A checkpoint that is being written."""

    target: Path
    """Its folder, once it is complete."""
    partial: Path
    """Its folder until then; no two saves have the same, so a writer that outlived its run disturbs none."""


class RunDirectory:
    """One process at a time works with a run's folder; `claim` comes first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._lock_file: IO[str] | None = None
        self._config: Config | None = None

    def claim(self, config: Config, allow_change: Sequence[str] = ()) -> list[str]:
        """Make the folder this run's own until the process ends, or check that it already is.

        Returns a line for each setting that differs from the newest checkpoint's because `allow_change` names it. Raises
        `UserError` when the folder belongs to a run with other settings, to another process, or to somebody's files, and when its
        newest checkpoint is not complete.
        """
        refuse_unknown(allow_change)
        stored = self.path / CONFIG
        with writing(self.path):
            if (
                self.path.exists()
                and not stored.exists()
                and any(not _may_be_ours(path) for path in self.path.iterdir())
            ):
                raise UserError(f"{self.path} is not empty and holds no {CONFIG}; choose another run_dir")
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock()
            owner = self._owner()
            allowed = (
                refuse_changes(owner, load_config(owner / CONFIG, []), config, allow_change) if owner else []
            )
            save_config(config, stored)  # before anything else: by it the folder is known as a run's
            self.checkpoints.mkdir(exist_ok=True)
            self._remove_leftovers()
            self._point_to_latest()
        self._config = config
        return allowed

    def latest(self) -> Path | None:
        """The newest checkpoint. Raises `UserError` where that one is not complete, or of another format."""
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

    def has(self, iteration: int) -> bool:
        """Whether the state after this iteration is saved."""
        return (self.checkpoints / _name(iteration)).exists()

    def refuse_damaged(self, checkpoint: Path, problems: Sequence[str]) -> None:
        """Raise `UserError` if there are `problems` with a checkpoint's files (`check_files` finds them), with the mend."""
        if problems:
            raise self._damaged(checkpoint, problems)

    def _damaged(self, checkpoint: Path, problems: Sequence[str]) -> UserError:
        more = f" (and {len(problems) - 1} more of its files)" if len(problems) > 1 else ""
        older = self.previous(checkpoint)
        mend = (
            f"to go on from {older.name}"
            if older
            else "to start the run again, since there is no older checkpoint"
        )
        return UserError(
            f"checkpoint {checkpoint} is damaged: {problems[0]}{more}; restore it from a copy, or remove that folder {mend}"
        )

    def load_state(self, checkpoint: Path) -> LoopState:
        """Where the loop stood. Raises `UserError` where that is damaged."""
        try:
            state = LoopState(**json.loads((checkpoint / LOOP_STATE).read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise self._damaged(
                checkpoint, [f"its {LOOP_STATE} is no state of this version's loop ({error})"]
            ) from None
        if _name(state.iteration) != checkpoint.name:
            raise self._damaged(checkpoint, [f"its {LOOP_STATE} is of iteration {state.iteration}"])
        return state

    def begin_save(self, state: LoopState) -> PendingSave:
        """Make a hidden folder with all that the driver writes; the ranks then write into its weights/ and rng/.

        `has(state.iteration)` must be false. UserError when the disk refuses; then nothing is left of it.
        """
        config = self._claimed()
        target = self.checkpoints / _name(state.iteration)
        pending = PendingSave(target, target.with_name(f".{target.name}.{secrets.token_hex(4)}"))
        try:
            with writing(target):
                for folder in ("weights", "rng", "hf"):
                    (pending.partial / folder).mkdir(parents=True)
                copy_companions(Path(config.model.path), pending.partial / "hf")
                (pending.partial / LOOP_STATE).write_text(json.dumps(asdict(state)) + "\n")
                save_config(config, pending.partial / CONFIG)
        except BaseException:
            self.abandon(pending)
            raise
        return pending

    def commit(self, pending: PendingSave, files: Mapping[str, FileRecord]) -> Path:
        """Give a checkpoint its manifest and its name, when all is on disk; then remove those that need not stay.

        `files` records at least what the ranks wrote, by path relative to the checkpoint. Raises `UserError` when the disk refuses,
        or holds something else than the records say; then nothing is left of this checkpoint, and the others are as they were.
        """
        config, target, partial = self._claimed(), pending.target, pending.partial
        try:
            with writing(target):
                own = [name for name in list_files(partial) if name.startswith(OWN_FILES)]
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
        """Remove what there is of a checkpoint that will not be completed."""
        shutil.rmtree(pending.partial, ignore_errors=True)

    def _claimed(self) -> Config:
        if self._config is None:
            raise RuntimeError("claim the run's folder before saving into it")
        return self._config

    def _lock(self) -> None:
        if self._lock_file is not None:
            return
        self._lock_file = open(self.path / LOCK, "w")  # noqa: SIM115 (held until the process ends)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is training in {self.path}; wait for it or choose another run_dir"
            ) from None

    def _owner(self) -> Path | None:
        """The folder whose settings the run has to keep: its newest checkpoint, or its own once an iteration is in the log."""
        checkpoint = self.latest()
        if checkpoint is None:
            return (
                self.path if any(record.kind == "iteration" for record in read_metrics(self.path)) else None
            )
        problem = check_file(checkpoint / CONFIG, read_manifest(checkpoint).files.get(CONFIG))
        self.refuse_damaged(checkpoint, [problem] if problem else [])
        return checkpoint

    def _visible(self) -> list[Path]:
        """Everything that has a checkpoint's name, oldest first."""
        if not self.checkpoints.is_dir():
            return []
        return sorted((path for path in self.checkpoints.iterdir() if NAME.fullmatch(path.name)), key=_number)

    def _remove_leftovers(self) -> None:
        """Remove what killed runs left half written or half removed; the lock says that nobody is at it any more."""
        for path in self.checkpoints.glob(".iteration_*"):
            shutil.rmtree(path, ignore_errors=True)

    def _point_to_latest(self) -> None:
        """Let `latest` name the newest checkpoint, from one moment to the next."""
        link, fresh = self.checkpoints / LATEST, self.checkpoints / f".{LATEST}"
        found = self._visible()
        fresh.unlink(missing_ok=True)
        if found:
            fresh.symlink_to(found[-1].name)
            fresh.replace(link)
        else:
            link.unlink(missing_ok=True)

    def _retain(self, config: Config) -> None:
        keep = config.checkpoint
        # From the log, since a checkpoint may be evaluated after it was saved, or by the run that goes on from it.
        accuracies = {
            record.iteration: record.values.get("evaluation/avg_at_k")
            for record in read_metrics(self.path)
            if record.kind == "evaluation"
        }
        checkpoints = [(_number(path), accuracies.get(_number(path))) for path in self._visible()]
        for iteration in to_remove(checkpoints, keep.keep_last, keep.keep_best, keep.keep_every):
            hidden = self.checkpoints / f".{_name(iteration)}.{secrets.token_hex(4)}"
            (self.checkpoints / _name(iteration)).rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)


def _name(iteration: int) -> str:
    return f"iteration_{iteration:06d}"


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("iteration_"))


def _may_be_ours(path: Path) -> bool:
    """Whether a first start that the disk ended may have left this in its folder."""
    empty = path.name == "checkpoints" and path.is_dir() and not any(path.iterdir())
    return empty or path.name == LOCK or path.name.startswith(CONFIG)


def _info(iteration: int, config: Config) -> dict[str, Any]:
    """What a run's manifests say beside the files."""
    packages = ("megatron-fipo", "megatron-core", "torch")
    versions = {package: version(package) for package in packages}
    return {"iteration": iteration, "layout": asdict(config.parallel), "versions": versions}


def _refuse_incomplete(partial: Path, files: Mapping[str, FileRecord]) -> None:
    """Raise `UserError` unless the disk holds the recorded files and no others."""
    # By name, not from the list: a network file system may list other nodes' files late.
    different = [name for name, record in files.items() if _size(partial / name) != record.size]
    wrong = sorted({*different, *(set(list_files(partial)) - files.keys())})
    if wrong:
        more = f" (nor are {len(wrong) - 1} other files)" if len(wrong) > 1 else ""
        raise UserError(
            f"{partial / wrong[0]} is not what the ranks wrote there{more}, so the checkpoint is given up; "
            "see that all ranks write to one shared file system, then run the same command again"
        )


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
