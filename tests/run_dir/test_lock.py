"""One process at a time in a run's folder, also on a file system that has no flock, as Lustre without `-o flock`."""

import errno
import fcntl
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_fipo.errors import UserError
from megatron_fipo.run_dir import lock
from megatron_fipo.run_dir.lock import LEASE, Owner, RunLock
from megatron_fipo.run_dir.loop_state import LoopState
from tests.run_dir.claimed_run import claim, claimed, config

ROOT = Path(__file__).parents[2]
HOLDER = """
import errno, fcntl, sys, time
from pathlib import Path
from megatron_fipo.run_dir import lock

def refuse(file, operation):
    raise OSError(errno.ENOSYS, "Function not implemented")

fcntl.flock = refuse
lock.RENEW_S = 0.1
held = lock.RunLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
if len(sys.argv) > 2:
    held.release()
    print("released", flush=True)
"""


@pytest.fixture(params=lock.UNSUPPORTED, ids=errno.errorcode.get)
def no_flock(request, monkeypatch) -> None:
    def refuse(file, operation):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(lock, "RENEW_S", 0.05)
    monkeypatch.setattr(lock, "EXPIRES_S", 0.6)


@pytest.fixture
def holder(tmp_path) -> Iterator[subprocess.Popen]:
    """Another process with the lease of `tmp_path`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path), "release"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def lease_of(folder: Path) -> Owner:
    return Owner(**json.loads((folder / LEASE).read_text()))


def from_another_host(folder: Path) -> Owner:
    """A lease that nobody renews."""
    owner = replace(Owner.this_process(), host="another", job="77")
    (folder / LEASE).write_text(json.dumps(asdict(owner)))
    return owner


def test_a_real_lock_leaves_no_lease(tmp_path):
    held = RunLock(tmp_path)
    assert held.note is None
    assert not (tmp_path / LEASE).exists()
    with pytest.raises(UserError, match=r"another process is training in .*; wait for it"):
        RunLock(tmp_path)
    held.release()
    RunLock(tmp_path).release()


def test_other_errors_of_flock_are_not_hidden(tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        RunLock(tmp_path)


def test_a_lease_is_renewed_and_names_its_owner(tmp_path, no_flock, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    held = RunLock(tmp_path)
    assert held.note is not None
    assert "without locks (flock)" in held.note
    owner = lease_of(tmp_path)
    assert (owner.host, owner.pid, owner.job) == (socket.gethostname(), os.getpid(), "4711")
    assert str(owner) == f"process {os.getpid()} on {socket.gethostname()} of job 4711"
    deadline = time.monotonic() + 30
    while lease_of(tmp_path).count <= owner.count:
        assert time.monotonic() < deadline
    held.check()
    held.release()
    assert [path.name for path in tmp_path.iterdir()] == [lock.LOCK]


def test_a_process_that_lives_keeps_its_lease(tmp_path, no_flock, monkeypatch, holder):
    monkeypatch.setattr(lock, "EXPIRES_S", 60.0)
    with pytest.raises(
        UserError, match=rf"process {holder.pid} on .* is training in {tmp_path}; wait for it"
    ):
        RunLock(tmp_path)
    holder.communicate("")
    RunLock(tmp_path).release()  # it was released


def test_a_killed_process_of_this_host_is_noticed_at_once(tmp_path, no_flock, monkeypatch, holder):
    monkeypatch.setattr(lock, "EXPIRES_S", 10000.0)
    holder.kill()
    holder.wait()
    held = RunLock(tmp_path)
    assert lease_of(tmp_path).pid == os.getpid()
    held.release()


def test_another_process_with_the_pid_of_the_owner_is_not_the_owner(tmp_path, no_flock, monkeypatch):
    monkeypatch.setattr(lock, "EXPIRES_S", 10000.0)
    owner = replace(Owner.this_process(), started=0.0)
    (tmp_path / LEASE).write_text(json.dumps(asdict(owner)))
    RunLock(tmp_path).release()


def test_a_lease_of_another_host_is_taken_when_nobody_renews_it(tmp_path, no_flock):
    from_another_host(tmp_path)
    start = time.monotonic()
    held = RunLock(tmp_path)
    assert time.monotonic() - start >= lock.EXPIRES_S
    assert lease_of(tmp_path).host == socket.gethostname()
    held.release()


def test_who_has_lost_its_lease_writes_nothing_more(tmp_path, no_flock):
    directory = claimed(tmp_path)
    directory.begin_save(LoopState(iteration=1))
    from_another_host(tmp_path)
    with pytest.raises(UserError, match=r"process .* on another of job 77 has taken"):
        directory.begin_save(LoopState(iteration=2))
    directory._lock.release()
    assert lease_of(tmp_path).host == "another"


def test_a_run_reports_once_that_its_folder_has_no_locks(tmp_path, no_flock):
    from megatron_fipo.run_dir.run_directory import RunDirectory

    directory = RunDirectory(tmp_path)
    (line,) = claim(directory, config(tmp_path))
    assert "without locks" in line
    directory._lock.release()
    assert claim(RunDirectory(tmp_path), config(tmp_path)) == [line]


def test_a_lease_that_cannot_be_read_is_one_sentence(tmp_path, no_flock):
    (tmp_path / LEASE).write_text("{")
    with pytest.raises(UserError, match=r"is not a lease of this version; remove it if no process trains in"):
        RunLock(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"token": "../../outside"},
        {"token": ["a"]},
        {"pid": "1"},
        {"pid": -1},
        {"pid": 2**70},
        {"started": None},
        {"host": 5},
        {"host": "a\nb"},
        {"job": 7},
        {"count": "1"},
    ],
)
def test_a_lease_with_values_that_no_process_writes_is_refused(tmp_path, no_flock, change):
    folder = tmp_path / "a/run"
    folder.mkdir(parents=True)
    values = asdict(replace(Owner.this_process(), pid=1)) | change
    (folder / LEASE).write_text(json.dumps(values))
    with pytest.raises(UserError, match="is not a lease of this version; remove it"):
        RunLock(folder)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [lock.LOCK, LEASE, "a", "run"]


def test_the_lock_changes_no_file_that_it_is_a_link_to(tmp_path):
    (tmp_path / "other").write_text("keep")
    (tmp_path / lock.LOCK).symlink_to("other")
    RunLock(tmp_path).release()
    assert (tmp_path / "other").read_text() == "keep"


def test_of_several_that_take_an_expired_lease_one_gets_it(tmp_path, no_flock):
    def take(_: int) -> RunLock | str:
        try:
            return RunLock(tmp_path)
        except UserError as error:
            return str(error)

    for _ in range(2):
        from_another_host(tmp_path)
        with ThreadPoolExecutor(6) as pool:
            results = list(pool.map(take, range(6)))
        (winner,) = [held for held in results if isinstance(held, RunLock)]
        others = [result for result in results if isinstance(result, str)]
        assert all("is training in" in reason or "is taking over" in reason for reason in others)
        winner.check()
        winner.release()
        assert [path.name for path in tmp_path.iterdir()] == [lock.LOCK]


def test_a_take_over_that_was_killed_names_what_to_remove(tmp_path, no_flock):
    owner = from_another_host(tmp_path)
    marker = tmp_path / f"{LEASE}.{owner.token}.taken"
    marker.touch()
    with pytest.raises(UserError, match=f"remove {re.escape(str(marker))} if there is none"):
        RunLock(tmp_path)
    marker.unlink()
    RunLock(tmp_path).release()
