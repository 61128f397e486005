"""The Ray cluster of a run on this machine: apart from the driver's process group, and ended with the driver however that ends."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.system.runs import MARK, ROOT, default_signals, marked


class Driver:
    """A driver in a session of its own, and how to find every process that descends from it."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.system.own_cluster_run", *arguments],
            cwd=ROOT,
            env={**os.environ, **environment, MARK: self.mark},
            start_new_session=True,
            preexec_fn=default_signals,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.facts: dict[str, Any] = {}

    def started(self) -> "Driver":
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("{"), line + self.process.communicate()[1]
        self.facts = json.loads(line)
        return self

    def family(self, name: str) -> list[psutil.Process]:
        return [process for process in self.alive() if name in " ".join(process.cmdline())]

    def alive(self) -> list[psutil.Process]:
        """Every process that descends from this driver."""
        return marked(self.mark)

    @property
    def folder(self) -> Path:
        """The run's own folder for Ray's files."""
        return Path(self.facts["logs"]).parents[2]

    def nothing_left(self) -> bool:
        """Within some seconds: neither processes nor files."""
        folder = self.folder
        deadline = time.monotonic() + 30
        while (self.alive() or folder.exists()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return not self.alive() and not folder.exists()

    def end(self) -> None:
        self.process.kill()
        if self.facts:
            self.nothing_left()
        for process in self.alive():
            with suppress(psutil.Error):
                process.kill()
        self.process.communicate()


@pytest.fixture
def driver() -> Iterator[Driver]:
    driver = Driver()
    yield driver.started()
    driver.end()


def test_no_process_of_ray_is_in_the_driver_s_group_and_all_end_with_it():
    driver = Driver("return").started()
    try:
        groups = {pid: os.getpgid(pid) for pid in driver.facts["family"] if psutil.pid_exists(pid)}
        assert driver.process.pid not in groups.values()
        assert driver.process.wait(60) == 0
        assert driver.nothing_left()
    finally:
        driver.end()


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, -15),
        (signal.SIGKILL, -9),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, -1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_the_group_ends_driver_and_cluster(driver, number, code):
    os.killpg(driver.process.pid, number)
    assert driver.process.wait(30) == code
    assert driver.nothing_left()


@pytest.mark.parametrize(
    "victim", ["gcs_server", pytest.param("raylet/raylet", marks=pytest.mark.slow), "cluster_process.py"]
)
def test_a_lost_cluster_is_one_sentence_within_seconds(driver, victim):
    start = time.monotonic()
    driver.family(victim)[0].kill()
    _, errors = driver.process.communicate(timeout=40)
    assert driver.process.returncode == 2
    assert time.monotonic() - start < 30  # a few seconds on an idle machine; Ray's own limit is a minute
    assert errors.strip().splitlines()[-1].startswith("Ray's processes on this machine ended unexpectedly")
    assert "Traceback" not in errors
    assert driver.nothing_left()


def test_other_users_cannot_reach_ray_s_files(driver):
    assert driver.folder.name.startswith("fipo-")
    assert driver.folder.stat().st_mode & 0o777 == 0o700  # Ray opens its own folder, below, to all users


def test_two_runs_and_a_running_cluster_leave_each_other_alone(driver):
    other = Driver(RAY_ADDRESS=driver.facts["address"]).started()
    try:
        assert other.facts["address"] != driver.facts["address"]
        assert other.facts["cpus"] == driver.facts["cpus"] == 2.0
        other.process.terminate()
        assert other.process.wait(30) == -15
        assert other.nothing_left()
        assert driver.process.poll() is None
        assert driver.family("gcs_server")
    finally:
        other.end()


@pytest.mark.parametrize("name", ["x" * 90, pytest.param("with space", marks=pytest.mark.slow)])
def test_ray_starts_whatever_the_name_of_tmpdir(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    driver = Driver("return", TMPDIR=str(folder))
    try:
        output, errors = driver.process.communicate(timeout=60)
        assert driver.process.returncode == 0, errors
        assert f"TMPDIR={folder}" in output.splitlines()[0]
        assert list(folder.iterdir()) == []
    finally:
        driver.end()


@pytest.mark.parametrize(
    ("environment", "words"),
    [({"TMPDIR": "/nowhere"}, "TMPDIR=/nowhere is not a folder"), ({"TMPDIR": "/proc"}, "TMPDIR=/proc")],
)
def test_a_tmpdir_that_cannot_be_used_is_one_sentence(environment, words):
    driver = Driver(**environment)
    _, errors = driver.process.communicate(timeout=60)
    assert driver.process.returncode == 2
    assert words in errors
    assert len(errors.strip().splitlines()) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize(
    ("mount", "code", "words"),
    [
        ("mount -t tmpfs -o ro tmpfs /dev/shm", 2, "/dev/shm cannot be written (Read-only file system)"),
        ("mount -t tmpfs -o size=16m tmpfs /dev/shm", 0, "/dev/shm has 0.02 GiB of free space"),
        ("mount -t tmpfs -o size=1m tmpfs /mnt", 2, "TMPDIR=/mnt has 1 MB of free space"),
        (
            "mount -o bind,ro /etc /mnt && mount -o remount,bind,ro /mnt",
            2,
            "Ray cannot keep its files in TMPDIR=/mnt",
        ),
    ],
)
def test_mounts_that_ray_cannot_use_are_one_sentence(mount, code, words):
    environment = {name: value for name, value in os.environ.items() if name not in ("TMPDIR", "RAY_TMPDIR")}
    if "/mnt" in mount:
        environment["TMPDIR"] = "/mnt"  # not /tmp, where the checkout may be
    command = f"{mount} && exec {sys.executable} -m tests.system.own_cluster_run return"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == code, done.stderr
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
