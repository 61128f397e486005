"""A run's folder: which checkpoints it holds, and where the loop stood at each.

    run_dir/config.yaml                       the resolved configuration
    run_dir/checkpoints/iteration_000005/     weights/ (distributed checkpoint) and loop.json
    run_dir/metrics.jsonl, samples.jsonl      what happened
    run_dir/model/                            the trained model in Hugging Face format
    run_dir/report.html

A checkpoint is written under a name that starts with a dot and renamed when it is whole, so every folder that shows is complete.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from megatron_fipo.config import Config, differences, load_config, save_config
from megatron_fipo.errors import UserError, writing
from megatron_fipo.trainer.metrics_log import read_metrics

PREFIX = "iteration_"


@dataclass
class LoopState:
    """Everything the loop itself must know to go on; weights and optimizer lie beside it."""

    iteration: int = 0
    """Iterations completed."""
    weight_version: int = 0
    """Version that the engines serve: one per iteration."""
    dataset: dict[str, Any] = field(default_factory=dict)
    """Order and position of the training data."""
    surplus: list[Any] = field(default_factory=list)
    """Groups that dynamic sampling finished but did not need."""


# What a later run may change: how long it goes on, how the work is split and watched. Everything else would make it another run.
FREE_KEYS = (
    "run_dir",
    "iterations",
    "save_every",
    "evaluation.",
    "tracking.",
    "ray_address",
    "parallel.",
    "head.",
    "model.recompute",
    "model.layer_spec",
    "rollout.num_engines",
    "rollout.timeout_s",
    "rollout.max_retries",
    "rollout.weight_bucket_mb",
)
MICRO_BATCH_KEY = "batch.max_tokens_per_micro_batch"
"""Free too, as long as the normalisation does not depend on micro-batches."""
LOCK = ".lock"


class RunDirectory:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._lock_file: IO[str] | None = None

    def claim(self, config: Config) -> None:
        """Make the folder this run's own until the process ends, or check that it already is.

        Raises `UserError` when it belongs to a run with other settings, to another process, or to somebody's files.
        """
        stored = self.path / "config.yaml"
        with writing(self.path):
            if self.path.exists() and not stored.exists() and any(path.name != LOCK for path in self.path.iterdir()):
                raise UserError(f"{self.path} is not empty and holds no config.yaml; choose another run_dir")
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock()
            if stored.exists() and self.started():
                _refuse_other_settings(self.path, load_config(stored, []), config)
            self.checkpoints.mkdir(exist_ok=True)
            save_config(config, stored)

    def _lock(self) -> None:
        if self._lock_file is not None:
            return
        self._lock_file = open(self.path / LOCK, "w")  # noqa: SIM115 (held until the process ends)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is training in {self.path}; wait for it or choose another run_dir") from None

    def started(self) -> bool:
        """Whether anything that depends on the settings has come of the run: a checkpoint, or an iteration in the log."""
        return self.latest() is not None or any(record.kind == "iteration" for record in read_metrics(self.path))

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        found = sorted(path for path in self.checkpoints.glob(f"{PREFIX}*") if (path / "loop.json").exists())
        return found[-1] if found else None

    def load_state(self, checkpoint: Path) -> LoopState:
        return LoopState(**json.loads((checkpoint / "loop.json").read_text()))

    def save(self, state: LoopState, write_weights: Callable[[Path], Any]) -> Path:
        """Write a checkpoint beside the older one, and only when it shows remove that. One that shows already is left as it is."""
        target = self.checkpoints / f"{PREFIX}{state.iteration:06d}"
        if target == self.latest():
            return target
        partial = self.checkpoints / f".{target.name}"
        try:
            with writing(target):
                shutil.rmtree(partial, ignore_errors=True)
                (partial / "weights").mkdir(parents=True)
                write_weights(partial / "weights")
                with open(partial / "loop.json", "w") as file:
                    json.dump(asdict(state), file)
                    file.flush()
                    os.fsync(file.fileno())
                partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        for older in self.checkpoints.glob(f"{PREFIX}*"):
            if older != target:
                shutil.rmtree(older)
        return target


def _refuse_other_settings(path: Path, stored: Config, config: Config) -> None:
    free: tuple[str, ...] = FREE_KEYS
    if config.objective.normalization == "token_mean":
        free += (MICRO_BATCH_KEY,)
    changed = [key for key in differences(stored, config) if not key.startswith(free)]
    if changed:
        raise UserError(
            f"{path} belongs to a run with other settings ({', '.join(changed)}); choose another run_dir or restore them"
        )
