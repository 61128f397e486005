"""Nodes of a network file system see each other's new files late; a checkpoint is complete all the same.

A node with an old view is a rank whose listings of folders are empty, or a file that appears later.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Timer
from types import SimpleNamespace

import pytest

from megatron_fipo.checkpoint import manifest
from megatron_fipo.checkpoint.manifest import (
    check_files,
    list_files,
    read_manifest,
    write_manifest,
    wrong_names,
)
from megatron_fipo.driver.checkpoint_saver import CheckpointSaver
from megatron_fipo.errors import UserError
from megatron_fipo.run_dir.loop_state import LoopState
from megatron_fipo.run_dir.run_directory import DRIVER_FILES, RunDirectory
from megatron_fipo.trainer import rl_worker
from megatron_fipo.trainer.rl_worker import RLWorker
from tests.ranks import run_ranks
from tests.run_dir.claimed_run import claim, claimed, save, write_ranks
from tests.run_dir.claimed_run import config as settings_of
from tests.run_dir.saved_run import RANKS, settings, train_and_write, unlock


def list_nothing(empty: Path) -> None:
    """Every listing is that of an empty folder."""
    scandir = os.scandir
    os.listdir = lambda path=".": []
    os.scandir = lambda path=".": scandir(empty)


def write_with_an_old_view(rank: int, world_size: int, model: Path, folder: Path, empty: Path):
    """Rank 1 never sees a file in a listing."""
    if rank == 1:
        list_nothing(empty)
        assert list_files(folder) == []
    return train_and_write(rank, world_size, model, 1, folder)[0]


def test_ranks_hash_their_files_whatever_listings_show(saved_run, tmp_path):
    directory = RunDirectory(tmp_path / "run")
    claim(directory, settings(saved_run.model, tmp_path / "run"))
    empty = tmp_path / "empty"
    empty.mkdir()
    try:
        pending = directory.begin_save(LoopState(1, 1))
        parts = run_ranks(RANKS, write_with_an_old_view, saved_run.model, pending.partial, empty)
        names = sorted(name for part in parts for name in part)
        assert names == [name for name in list_files(pending.partial) if not name.startswith(DRIVER_FILES)]
        assert all(any(name.startswith("weights/__") for name in part) for part in parts)
        checkpoint = directory.commit(pending, {name: file for part in parts for name, file in part.items()})
        found = read_manifest(checkpoint)
        assert [*check_files(checkpoint, found.files), *wrong_names(checkpoint, found)] == []
    finally:
        unlock(directory)


def test_the_driver_waits_for_a_file_that_it_sees_late(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "POLL_S", 0.01)
    directory = claimed(tmp_path)
    pending = directory.begin_save(LoopState(iteration=3))
    files = write_ranks(pending)
    shard = pending.partial / "weights/__1_0.distcp"
    hidden = shard.rename(tmp_path / "late")
    appears = Timer(0.3, lambda: hidden.rename(shard))
    appears.start()
    try:
        checkpoint = directory.commit(pending, files)
    finally:
        appears.join()
    assert check_files(checkpoint, read_manifest(checkpoint).files) == []


class OldView:
    """This node's cached listing of a folder: it stays until the node itself changes the folder, as on NFS."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self._folder, self._names = folder, names
        self._changed = folder.stat().st_mtime_ns
        self._iterdir = Path.iterdir

    def iterdir(self, path: Path) -> Iterator[Path]:
        if path == self._folder and path.stat().st_mtime_ns == self._changed:
            return iter([path / name for name in self._names])
        return self._iterdir(path)


def test_a_run_on_another_node_resumes_from_the_newest_checkpoint(tmp_path, monkeypatch):
    first = claimed(tmp_path, "checkpoint.keep_last=2")
    newest = [save(first, iteration) for iteration in (3, 4)][-1]
    first._lock.release()
    view = OldView(first.checkpoints, ["iteration_000003"])
    monkeypatch.setattr(Path, "iterdir", lambda path: view.iterdir(path))
    second = RunDirectory(tmp_path)
    assert [path.name for path in second.checkpoints.iterdir()] == ["iteration_000003"]
    second.prompt_time()  # what a command reads first
    assert second.latest() == newest
    claim(second, settings_of(tmp_path, "checkpoint.keep_last=2"))
    assert second.latest() == newest
    assert not [path for path in second.checkpoints.iterdir() if path.name.startswith(".")]


def test_a_run_waits_for_a_file_of_the_last_save_that_it_sees_late(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "POLL_S", 0.01)
    directory = claimed(tmp_path)
    checkpoint = save(directory, 3)
    shard = checkpoint / "weights/__1_0.distcp"
    hidden = shard.rename(tmp_path / "late")
    appears = Timer(0.3, lambda: hidden.rename(shard))
    appears.start()
    ranks = SimpleNamespace(
        check_files=lambda folder: check_files(folder, read_manifest(folder).files), load=lambda folder: True
    )
    try:
        assert CheckpointSaver(directory, ranks).load(checkpoint)
    finally:
        appears.join()


@pytest.mark.parametrize(("age_s", "wait_s"), [(0, 60), (50, 10), (61, 0), (10**6, 0), (-5, 60)])
def test_a_view_is_old_for_a_minute_after_the_save(tmp_path, age_s, wait_s):
    (tmp_path / manifest.NAME).touch()
    written = time.time() - age_s
    os.utime(tmp_path / manifest.NAME, (written, written))
    assert abs(manifest.unsettled_s(tmp_path) - wait_s) < 5


def test_the_driver_names_a_file_that_is_not_in_the_manifest(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "NODE_CACHE_S", 0.0)
    directory = claimed(tmp_path)
    checkpoint = save(directory, 3)
    intact = SimpleNamespace(check_files=lambda folder: [], load=lambda folder: True)
    assert CheckpointSaver(directory, intact).load(checkpoint)
    (checkpoint / "rng/stray").write_text("x")
    with pytest.raises(UserError, match=r"is damaged: .*rng/stray is not in the manifest"):
        CheckpointSaver(directory, intact).load(checkpoint)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_does_not_see_a_file_is_named(tmp_path, monkeypatch, rank):
    monkeypatch.setattr(rl_worker, "NODE_CACHE_S", 0.1)
    names = ["weights/a", "weights/b"]
    (tmp_path / "weights").mkdir()
    for name in names:
        (tmp_path / name).write_text(name)
    write_manifest(tmp_path, manifest.hash_files(tmp_path, names), {})
    (tmp_path / names[rank]).unlink()
    problems = [
        RLWorker.check_files(SimpleNamespace(rank=number, world_size=2), str(tmp_path)) for number in (0, 1)
    ]
    assert problems[rank] == [f"{tmp_path}/{names[rank]} is missing, as rank {rank} sees it"]
    assert problems[1 - rank] == []
