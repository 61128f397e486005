"""A run's folder: which checkpoints it holds, and where the loop stood at each.

    run_dir/config.yaml                       the resolved configuration
    run_dir/checkpoints/iteration_000005/     weights/ (distributed checkpoint) and loop.json
    run_dir/metrics.jsonl, samples.jsonl      what happened
    run_dir/model/                            the trained model in Hugging Face format
    run_dir/report.html

A checkpoint is written under a name that starts with a dot and renamed when it is whole, so every folder that shows is complete.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_fipo.config import Config, differences, load_config, save_config
from megatron_fipo.errors import UserError

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


# A later run may go on longer or watch itself differently; everything else would make it another run.
FREE_KEYS = (
    "iterations",
    "save_every",
    "evaluation.",
    "tracking.",
    "ray_address",
    "parallel.",
    "rollout.num_engines",
    "rollout.timeout_s",
)


class RunDirectory:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"

    def claim(self, config: Config) -> None:
        """Make the folder this run's own, or check that it already is. Raises `UserError` when it belongs to another config."""
        stored = self.path / "config.yaml"
        if stored.exists():
            changed = [key for key in differences(load_config(stored, []), config) if not key.startswith(FREE_KEYS)]
            if changed:
                raise UserError(
                    f"{self.path} belongs to a run with other settings ({', '.join(changed)}); choose another run_dir or restore them."
                )
        elif self.path.exists() and any(self.path.iterdir()):
            raise UserError(f"{self.path} is not empty and holds no config.yaml; choose another run_dir.")
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            save_config(config, stored)
        except OSError as error:
            raise UserError(f"cannot write {stored}: {error.strerror}.") from error

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        found = sorted(path for path in self.checkpoints.glob(f"{PREFIX}*") if (path / "loop.json").exists())
        return found[-1] if found else None

    def load_state(self, checkpoint: Path) -> LoopState:
        return LoopState(**json.loads((checkpoint / "loop.json").read_text()))

    def save(self, state: LoopState, write_weights: Callable[[Path], Any]) -> Path:
        """Write a checkpoint beside the older one, swap, and only then remove the older one."""
        target = self.checkpoints / f"{PREFIX}{state.iteration:06d}"
        partial = self.checkpoints / f".{target.name}"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "weights").mkdir(parents=True)
            write_weights(partial / "weights")
            with open(partial / "loop.json", "w") as file:
                json.dump(asdict(state), file)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"cannot save {target}: {error.strerror}; the previous checkpoint is untouched.") from error
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        for older in self.checkpoints.glob(f"{PREFIX}*"):
            if older != target:
                shutil.rmtree(older)
        return target
