"""A run directory of the bundled model, claimed, with checkpoints as two ranks write them."""

import os
from collections.abc import Sequence
from pathlib import Path

from megatron_fipo.checkpoint.manifest import FileRecord, hash_files
from megatron_fipo.config import Config, load_config
from megatron_fipo.run_dir.inputs import RunInputs, model_files
from megatron_fipo.run_dir.loop_state import LoopState
from megatron_fipo.run_dir.run_directory import PendingSave, RunDirectory

MODEL = Path(__file__).parents[2] / "examples/countdown/base-model"


INPUTS = RunInputs(model_files(MODEL), "train", {"one": "held-out"}, "2026-11-28T09:30:00")


def config(run_dir: Path, *overrides: str) -> Config:
    return load_config(None, [f"model.path={MODEL}", f"run_dir={run_dir}", *overrides])


def claim(directory: RunDirectory, config: Config, allow_change: Sequence[str] = ()) -> list[str]:
    return directory.claim(config, INPUTS, allow_change)


def claimed(run_dir: Path, *overrides: str) -> RunDirectory:
    directory = RunDirectory(run_dir)
    claim(directory, config(run_dir, *overrides))
    return directory


def write_ranks(pending: PendingSave) -> dict[str, FileRecord]:
    """What two ranks do between `begin_save` and `commit`."""
    names = []
    for rank in range(2):
        names += [f"weights/__{rank}_0.distcp", f"rng/rank_{rank:05d}.safetensors"]
        (pending.partial / names[-2]).write_bytes(os.urandom(100))
        (pending.partial / names[-1]).write_bytes(b"state")
    return hash_files(pending.partial, names)


def save(directory: RunDirectory, iteration: int) -> Path:
    pending = directory.begin_save(LoopState(iteration=iteration, weight_version=iteration))
    return directory.commit(pending, write_ranks(pending))


def names(directory: RunDirectory) -> list[str]:
    return sorted(path.name for path in directory.checkpoints.iterdir())
