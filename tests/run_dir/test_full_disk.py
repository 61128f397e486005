"""A disk that is full, read-only or limited costs the new checkpoint only, and is reported in one sentence."""

import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_fipo.checkpoint.manifest import FileRecord, check_files, hash_files, read_manifest
from megatron_fipo.errors import UserError
from megatron_fipo.run_dir.loop_state import LoopState
from megatron_fipo.run_dir.run_directory import PendingSave, RunDirectory
from tests.ranks import run_ranks
from tests.run_dir.claimed_run import claim
from tests.run_dir.saved_run import (
    NEWEST,
    OLDER,
    RANKS,
    contents,
    copy_run,
    resume,
    settings,
    train_and_write,
    unlock,
)


@pytest.fixture
def small_disk(saved_run, tmp_path) -> Iterator[Path]:
    """A disk of 40 MiB with a copy of the run on it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", disk]).returncode != 0
    ):
        pytest.skip("mounting a small disk is not permitted here")
    try:
        copy_run(saved_run, disk / "run")
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def fill(disk: Path, leave_bytes: int) -> Path:
    filler = disk / "filler"
    with open(filler, "wb") as file:
        file.write(bytes(max(0, shutil.disk_usage(disk).free - leave_bytes)))
    return filler


def write_as_ranks(pending: PendingSave) -> dict[str, FileRecord]:
    (pending.partial / "weights/__0_0.distcp").write_bytes(bytes(100_000))
    return hash_files(pending.partial, ["weights/__0_0.distcp"])


def write_or_return_error(rank: int, world_size: int, model: Path, folder: Path) -> str:
    try:
        train_and_write(rank, world_size, model, 3, folder)
    except UserError as error:
        return str(error)
    return "written"


def assert_intact(directory: RunDirectory) -> None:
    """Both checkpoints are unchanged, and nothing is left of a third."""
    assert sorted(path.name for path in directory.checkpoints.iterdir()) == [OLDER, NEWEST, "latest"]
    for name in (OLDER, NEWEST):
        folder = directory.checkpoints / name
        assert check_files(folder, read_manifest(folder).files) == []


@pytest.mark.parametrize("moment", ["begin", "ranks", "manifest"])
def test_a_full_disk_costs_the_new_checkpoint_only(saved_run, small_disk, moment):
    directory = RunDirectory(small_disk / "run")
    claim(directory, settings(saved_run.model, small_disk / "run"))
    if moment == "begin":
        filler = fill(small_disk, 0)
        with pytest.raises(UserError, match=r"cannot write .*No space left on device"):
            directory.begin_save(LoopState(3, 3))
    elif moment == "ranks":
        filler = fill(small_disk, 2**20)
        pending = directory.begin_save(LoopState(3, 3))
        for message in run_ranks(RANKS, write_or_return_error, saved_run.model, pending.partial):
            assert "cannot write the checkpoint" in message
            assert "No space left on device" in message
        directory.abandon(pending)
    else:
        pending = directory.begin_save(LoopState(3, 3))
        records = write_as_ranks(pending)
        filler = fill(small_disk, 0)
        with pytest.raises(UserError, match=r"cannot write .*No space left on device"):
            directory.commit(pending, records)
    assert_intact(directory)
    filler.unlink()
    pending = directory.begin_save(LoopState(3, 3))
    directory.commit(pending, write_as_ranks(pending))
    assert directory.latest().name == "iteration_000003"


def test_a_read_only_disk_is_one_sentence(saved_run, small_disk):
    directory = RunDirectory(small_disk / "run")
    claim(directory, settings(saved_run.model, small_disk / "run"))
    unlock(directory)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    before = contents(small_disk)
    for attempt in (
        lambda: directory.begin_save(LoopState(3, 3)),
        lambda: resume(saved_run.model, small_disk / "run"),
    ):
        with pytest.raises(UserError, match=r"cannot write .*Read-only file system"):
            attempt()
    assert contents(small_disk) == before
    assert_intact(directory)


def save_under_a_limit(rank: int, world_size: int, model: Path, run_dir: Path, step: str, limit: int) -> str:
    """With a limit of `limit` bytes per file, set by the operating system, from `step` on."""
    directory = RunDirectory(run_dir)
    claim(directory, settings(model, run_dir))
    pending = directory.begin_save(LoopState(3, 3)) if step == "commit" else None
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        directory.commit(pending, {}) if pending else directory.begin_save(LoopState(3, 3))
    except UserError as error:
        return str(error)
    return "saved"


@pytest.mark.parametrize(("step", "limit"), [("begin", 10), ("commit", 100)])
def test_a_file_that_cannot_grow_costs_the_new_checkpoint_only(saved_run, run_dir, step, limit):
    (message,) = run_ranks(1, save_under_a_limit, saved_run.model, run_dir, step, limit)
    assert message.startswith(f"cannot write {run_dir}")
    assert "File too large" in message
    directory = RunDirectory(run_dir)
    claim(directory, settings(saved_run.model, run_dir))
    assert_intact(directory)
