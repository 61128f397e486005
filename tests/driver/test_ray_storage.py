"""Folders that Ray cannot use are refused in one sentence with variable and fix, before Ray starts; downgrades are logged once."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from megatron_fipo.driver import ray_storage
from megatron_fipo.driver.ray_storage import (
    LONGEST_BASE,
    LONGEST_WORKER_BASE,
    check_shared_memory,
    make_session_folder,
    remove_session_folder,
    worker_variables,
)
from megatron_fipo.errors import UserError


def no_log(line: str) -> None:
    raise AssertionError(line)


@pytest.fixture
def short(tmp_path, monkeypatch):
    """A writable folder with a short name: that of pytest may be long."""
    folder = Path(f"/tmp/t{os.getpid()}")
    folder.mkdir()
    yield folder
    for left in folder.iterdir():
        left.rmdir()
    folder.rmdir()


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_the_folder_is_private_and_where_the_variable_says(short, variable):
    folder = make_session_folder({variable: str(short), "HOME": "/"}, no_log)
    assert folder.parent == short
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("environment", [{}, {"TMPDIR": ""}])
def test_without_a_variable_the_folder_is_in_tmp(environment):
    folder = make_session_folder(environment, no_log)
    assert folder.parent == Path("/tmp")
    folder.rmdir()


@pytest.mark.parametrize("name", ["x" * 60, "x" * 200, "ä" * 40, "with space", "with\ttab"])
def test_a_folder_whose_name_ray_cannot_use_is_replaced_by_tmp_and_that_is_logged(tmp_path, name):
    base = tmp_path / name
    base.mkdir()
    lines: list[str] = []
    folder = make_session_folder({"TMPDIR": str(base)}, lines.append)
    folder.rmdir()
    assert folder.parent == Path("/tmp")
    assert len(lines) == 1
    assert f"TMPDIR={base}" in lines[0]


def test_the_longest_name_leaves_space_for_the_longest_socket():
    session = "fipo-12345678/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
    assert len("x" * LONGEST_BASE + "/" + session) == 107


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("/nowhere", "is not a folder; create it, or unset TMPDIR"),
        ("/etc/hostname", "is not a folder"),
        ("/proc", "cannot keep its files in TMPDIR=/proc"),
        ("/sys", "cannot keep its files in TMPDIR=/sys"),
        ("/proc/self", "make it writable, or fix TMPDIR"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(base, words):
    with pytest.raises(UserError, match="TMPDIR") as refused:
        make_session_folder({"TMPDIR": base}, no_log)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("environment", "fix"), [({}, "set TMPDIR"), ({"TMPDIR": "/tmp"}, "fix TMPDIR")])
def test_a_full_disk_is_refused(monkeypatch, environment, fix):
    monkeypatch.setattr(ray_storage, "MIN_FREE_BYTES", 2**60)  # more than any disk has
    with pytest.raises(UserError, match=rf"/tmp has \d+ MB of free space.*{fix}"):
        make_session_folder(environment, no_log)


@pytest.mark.parametrize("keep_logs", [False, True])
def test_only_logs_stay_and_only_if_they_are_to(tmp_path, keep_logs):
    session = tmp_path / "fipo/ray/session_2026"
    for name in ("logs", "sockets", "runtime_resources"):
        (session / name).mkdir(parents=True)
        (session / name / "file").touch()
    (session / "port").touch()
    (tmp_path / "fipo/ray/session_latest").symlink_to(session)
    remove_session_folder(tmp_path / "fipo", keep_logs=keep_logs)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if not path.is_dir())
    assert left == (["fipo/ray/session_2026/logs/file"] if keep_logs else [])
    assert (tmp_path / "fipo/ray/session_latest/logs/file").exists() == keep_logs


@pytest.mark.parametrize("folder", ["/nowhere", "/proc", "/etc/hostname"])
def test_shared_memory_that_cannot_be_written_is_refused(folder):
    with pytest.raises(UserError, match=rf"{folder} cannot be written .*; mount a tmpfs there"):
        check_shared_memory(1, no_log, Path(folder))


def test_too_little_shared_memory_is_logged_once_and_refused_where_ray_refuses_it(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"object store needs .* enlarge it"):
        check_shared_memory(2**60, no_log, tmp_path)
    monkeypatch.setattr(ray_storage, "MAX_STORE_OUTSIDE_BYTES", 2**60)
    lines: list[str] = []
    check_shared_memory(2**60, lines.append, tmp_path)
    assert len(lines) == 1
    assert "slower files" in lines[0]
    check_shared_memory(1, no_log, tmp_path)


def test_ranks_get_a_folder_for_sockets_that_is_short_enough(tmp_path):
    """multiprocessing starts its server under the longest name that stays, and not under a longer one."""
    assert (
        worker_variables({}) == worker_variables({"TMPDIR": ""}) == worker_variables({"TMPDIR": "/tmp"}) == {}
    )
    short = tempfile.mkdtemp(dir="/tmp")
    try:
        for length, works in ((LONGEST_WORKER_BASE, True), (LONGEST_WORKER_BASE + 1, False)):
            base = Path(f"{short}/".ljust(length, "x"))
            base.mkdir()
            assert worker_variables({"TMPDIR": str(base)}) == ({} if works else {"TMPDIR": "/tmp"})
            program = "from multiprocessing import Manager\nif __name__ == '__main__': Manager().Queue()"
            script = base / "x.py"
            script.write_text(program)
            environment = {**os.environ, "TMPDIR": str(base)}
            done = subprocess.run([sys.executable, script], env=environment, capture_output=True, timeout=60)
            assert (done.returncode == 0) == works
    finally:
        shutil.rmtree(short)
