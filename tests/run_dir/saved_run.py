"""A real run of two iterations, both saved by two ranks: weights, optimizer, random states and the driver's
files.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch._dynamo  # imported once, before the ranks are forked

from megatron_fipo.checkpoint.distributed import CheckpointWriter, load_checkpoint
from megatron_fipo.checkpoint.manifest import (
    FileRecord,
    check_files,
    read_manifest,
    share_of,
    wrong_names,
)
from megatron_fipo.checkpoint.rng import load_rng, save_rng
from megatron_fipo.config import Config, load_config, save_config
from megatron_fipo.run_dir.loop_state import LoopState, RolloutState
from megatron_fipo.run_dir.run_directory import RunDirectory
from megatron_fipo.trainer.rl_worker import RLWorker
from tests.distributed.test_distributed_checkpoint import new_policy
from tests.distributed.test_policy_grid import FIPO, LAYOUTS, exported
from tests.distributed.tiny import write_model
from tests.ranks import run_ranks
from tests.run_dir.claimed_run import claim

LAYOUT = LAYOUTS["tp2"]
RANKS = 2
NEWEST, OLDER = "iteration_000002", "iteration_000001"


def settings(model: Path, run_dir: Path, *overrides: str) -> Config:
    fixed = ("parallel.tensor_model_parallel_size=2", "checkpoint.keep_last=2")
    return load_config(None, [f"model.path={model}", f"run_dir={run_dir}", *fixed, *overrides])


def train_and_write(
    rank: int, world_size: int, model: Path, steps: int, folder: Path
) -> tuple[dict[str, FileRecord], dict]:
    policy, shards = new_policy(model, LAYOUT)
    for _ in range(steps):
        policy.policy_step(shards, FIPO, lr=1e-3)
    save_rng(folder, rank)
    worker = SimpleNamespace(writer=CheckpointWriter(), rank=rank)
    worker.writer.start(policy.modules, policy.optimizer, folder / "weights", asynchronous=False)
    return RLWorker.hash_files(worker, str(folder)), exported(policy)


def save(directory: RunDirectory, model: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Save a checkpoint as a run does; returns its weights."""
    pending = directory.begin_save(
        LoopState(iteration, iteration, rollout=RolloutState({"position": iteration}))
    )
    written = run_ranks(RANKS, train_and_write, model, iteration, pending.partial)
    directory.commit(pending, {name: record for part, _ in written for name, record in part.items()})
    return written[0][1]


def resume(model: Path, run_dir: Path) -> tuple[Path, LoopState]:
    """The checks of a run before it loads anything; afterwards the lock is released."""
    directory = RunDirectory(run_dir)
    try:
        claim(directory, settings(model, run_dir))
        checkpoint = directory.latest()
        assert checkpoint is not None
        manifest = read_manifest(checkpoint)
        directory.refuse_damaged(checkpoint, wrong_names(checkpoint, manifest))
        for rank in range(RANKS):
            directory.refuse_damaged(
                checkpoint, check_files(checkpoint, share_of(manifest.files, rank, RANKS))
            )
        return checkpoint, directory.load_state(checkpoint)
    finally:
        unlock(directory)


def unlock(directory: RunDirectory) -> None:
    if directory._lock is not None:
        directory._lock.release()


def load_into_ranks(
    rank: int, world_size: int, model: Path, checkpoint: Path
) -> tuple[bool, dict[str, torch.Tensor]]:
    policy, _ = new_policy(model, LAYOUT)
    load_checkpoint(policy.modules, policy.optimizer, checkpoint / "weights")
    return load_rng(checkpoint, rank, world_size), exported(policy)


@dataclass
class SavedRun:
    model: Path
    run_dir: Path
    weights: dict[int, dict[str, torch.Tensor]]
    """By iteration, in Hugging Face names."""


def make_run(folder: Path) -> SavedRun:
    model = write_model(folder / "model", layers=2)
    (model / "tokenizer.json").write_text("{}")
    directory = RunDirectory(folder / "run")
    claim(directory, settings(model, folder / "run"))
    return SavedRun(
        model, folder / "run", {iteration: save(directory, model, iteration) for iteration in (1, 2)}
    )


def copy_run(saved_run: SavedRun, target: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(saved_run.run_dir, target, symlinks=True)
    save_config(settings(saved_run.model, target), target / "config.yaml")
    return target


def contents(folder: Path) -> dict[str, bytes | str]:
    """Everything in a folder except the lock, which belongs to the process that resumes."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = str(path.readlink())
        elif path.name != ".lock":
            found[str(path)] = path.read_bytes() if path.is_file() else "folder"
    return found
