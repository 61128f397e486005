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

from tests.system.runs import LONGEST_S, MARK, ROOT, check, default_signals, ended, marked, shown


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
        self.notes: list[str] = []
        """Lines of its output before the facts."""

    def started(self) -> "Driver":
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                self.facts = json.loads(line)
                return self
            self.notes.append(line)
        raise AssertionError("".join(self.notes) + shown(self.ended().stderr))

    def ended(self) -> subprocess.CompletedProcess:
        return ended(self.process)

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
        """Soon: neither processes nor files."""
        folder = self.folder
        deadline = time.monotonic() + LONGEST_S
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


@pytest.fixture(scope="module")
def lasting() -> Iterator[Driver]:
    """A driver that no test disturbs."""
    driver = Driver()
    yield driver.started()
    driver.end()


def test_no_process_of_ray_is_in_the_driver_s_group(lasting):
    groups = [os.getpgid(pid) for pid in lasting.facts["family"]]
    assert len(groups) > 3
    assert lasting.process.pid not in groups


def test_other_users_cannot_reach_ray_s_files(lasting):
    assert lasting.folder.name.startswith("fipo-")
    assert lasting.folder.stat().st_mode & 0o777 == 0o700  # Ray opens its own folder, below, to all users


def test_processes_of_a_run_do_not_ask_the_hub(lasting):
    assert lasting.facts["hub_offline"] == "1"


def end_group(driver: Driver, number: signal.Signals, code: int) -> None:
    """A signal to the driver's group ends the driver and its cluster."""
    os.killpg(driver.process.pid, number)
    done = check(driver.ended(), code)
    assert driver.nothing_left(), shown(done.stderr)


def test_two_runs_and_a_running_cluster_leave_each_other_alone(lasting):
    other = Driver(RAY_ADDRESS=lasting.facts["address"])
    try:
        other.started()
        assert other.facts["address"] != lasting.facts["address"]
        assert other.facts["cpus"] == lasting.facts["cpus"] == 2.0
        end_group(other, signal.SIGTERM, -15)
        assert lasting.process.poll() is None
        assert lasting.family("gcs_server")
    finally:
        other.end()


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGKILL, -9),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, -1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_the_group_ends_driver_and_cluster(driver, number, code):
    end_group(driver, number, code)


@pytest.mark.parametrize(
    "victim",
    [
        pytest.param("gcs_server", marks=pytest.mark.slow),  # test_signals.py kills that of a training run
        pytest.param("raylet/raylet", marks=pytest.mark.slow),
        "cluster_process.py",
    ],
)
def test_a_lost_cluster_is_one_sentence(driver, victim):
    """Ray itself would end the driver after a minute, with another code and a traceback."""
    driver.family(victim)[0].kill()
    errors = check(driver.ended(), 2).stderr
    assert errors.strip().splitlines()[-1].startswith("Ray's processes on this machine ended unexpectedly")
    assert "Traceback" not in errors
    assert driver.nothing_left()


@pytest.mark.parametrize("name", ["x" * 90, pytest.param("with space", marks=pytest.mark.slow)])
def test_a_run_that_ends_leaves_nothing_whatever_the_name_of_tmpdir(tmp_path, name):
    """It also keeps the user's own value of HF_HUB_OFFLINE."""
    folder = tmp_path / name
    folder.mkdir()
    driver = Driver("return", TMPDIR=str(folder), HF_HUB_OFFLINE="0")
    try:
        driver.started()
        assert f"TMPDIR={folder}" in driver.notes[0]
        assert driver.facts["hub_offline"] == "0"
        check(driver.ended())
        assert driver.nothing_left()
        assert list(folder.iterdir()) == []
    finally:
        driver.end()


@pytest.mark.parametrize(
    ("environment", "words"),
    [({"TMPDIR": "/nowhere"}, "TMPDIR=/nowhere is not a folder"), ({"TMPDIR": "/proc"}, "TMPDIR=/proc")],
)
def test_a_tmpdir_that_cannot_be_used_is_one_sentence(environment, words):
    driver = Driver(**environment)
    errors = check(driver.ended(), 2).stderr
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
    process = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    done = check(ended(process), code)
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
