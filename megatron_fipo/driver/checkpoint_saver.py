"""Checkpoints of a run: written by the ranks in the background, committed atomically, verified before loading."""

import contextlib
from pathlib import Path

from megatron_fipo.checkpoint.manifest import lasting, read_manifest, unsettled_s, wrong_names
from megatron_fipo.driver.trainer_group import RLTrainer
from megatron_fipo.errors import UserError
from megatron_fipo.run_dir.loop_state import LoopState
from megatron_fipo.run_dir.run_directory import PendingSave, RunDirectory


class CheckpointSaver:
    """One save at a time. A save that fails raises its reason as `UserError` and does not touch older checkpoints."""

    def __init__(self, directory: RunDirectory, trainer: RLTrainer) -> None:
        self.directory = directory
        self.trainer = trainer
        self._pending: PendingSave | None = None

    def save(self, state: LoopState) -> None:
        """Begin to save `state` with the ranks' weights, unless that iteration is saved already."""
        self.finish()
        if self.directory.has(state.iteration):
            return
        self._pending = self.directory.begin_save(state)
        with self._or_abandon(self._pending):
            self.trainer.start_save(self._pending.partial)

    def finish_if_written(self) -> None:
        """Complete the save under way if the ranks have written it."""
        self._finish(blocking=False)

    def finish(self) -> None:
        """Complete the save under way, if there is one."""
        self._finish(blocking=True)

    def load(self, checkpoint: Path) -> bool:
        """Check every file of a checkpoint and load it into the ranks. False if another parallel layout wrote it."""
        # First, because a rank waits for a file that its node does not show yet.
        recorded = read_manifest(checkpoint)
        wrong = lasting(lambda: wrong_names(checkpoint, recorded), unsettled_s(checkpoint))
        self.directory.refuse_damaged(checkpoint, wrong)
        self.directory.refuse_damaged(checkpoint, self.trainer.check_files(checkpoint))
        return self.trainer.load(checkpoint)

    def _finish(self, blocking: bool) -> None:
        pending = self._pending
        if pending is None:
            return
        with self._or_abandon(pending):
            if not self.trainer.save_finished(blocking):
                return
            self.directory.commit(pending, self.trainer.hash_files(pending.partial))
        self._pending = None

    @contextlib.contextmanager
    def _or_abandon(self, pending: PendingSave):
        try:
            yield
        except (UserError, RuntimeError):
            self._pending = None
            self.directory.abandon(pending)
            raise
