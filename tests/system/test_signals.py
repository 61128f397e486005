"""Signals to a training run as schedulers and terminals send them, to its process group: it saves, and exits with the documented code.

A stopped run is resumed on the cluster of the module, without the seconds that starting one takes.
"""

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.system.runs import (
    LONGEST_S,
    MARK,
    ROOT,
    command,
    default_signals,
    iterations,
    marked,
    shown,
    train_arguments,
)

SETTINGS = ("evaluation.before_training=false", "checkpoint.every=0")


class Run:
    """A run in a session of its own, as a shell with job control starts it."""

    def __init__(self, run_dir: Path, *overrides: str) -> None:
        self.run_dir = run_dir
        self.mark = uuid.uuid4().hex
        self.output = run_dir.with_suffix(".log")
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(
                command(*train_arguments(run_dir, *SETTINGS, "iterations=1000", *overrides)),
                cwd=ROOT,
                env={**os.environ, MARK: self.mark},
                start_new_session=True,
                preexec_fn=default_signals,
                stdout=output,
                stderr=output,
            )

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 400
        while not condition():
            assert self.process.poll() is None, shown(self.output.read_text())
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def send(self, number: int, to_group: bool = True) -> None:
        (os.killpg if to_group else os.kill)(self.process.pid, number)

    def ended(self, code: int) -> str:
        """Its output, after its end with this exit code: an update, a checkpoint and the end of all its processes."""
        try:
            found = self.process.wait(LONGEST_S)
        except subprocess.TimeoutExpired:
            found = None
        output = self.output.read_text()
        assert found == code, shown(output)
        return output

    def left(self) -> list[psutil.Process]:
        """Every process that descends from this run."""
        return marked(self.mark)

    def end(self) -> None:
        for process in self.left():
            with suppress(psutil.Error):
                process.kill()
        self.process.wait()


def trained(run: Run) -> bool:
    return (run.run_dir / "metrics.jsonl").exists() and bool(iterations(run.run_dir))


def saving(run: Run) -> bool:
    """A checkpoint is being written under its hidden name."""
    return any((run.run_dir / "checkpoints").glob(".iteration*"))


@pytest.mark.parametrize(
    ("number", "code", "to_group", "delay_s", "times"),
    [
        (signal.SIGTERM, 85, True, 0.0, 1),
        pytest.param(signal.SIGUSR1, 85, True, 0.4, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, True, 0.8, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 85, True, 1.2, 2, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 85, False, 0.2, 1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_leaves_nothing(train, tmp_path, number, code, to_group, delay_s, times):
    run = Run(tmp_path / "run")
    try:
        run.wait_until(lambda: trained(run))
        time.sleep(delay_s)  # another point of rollout, update and weight sync
        for _ in range(times):
            run.send(number, to_group)
            time.sleep(0.2)
        output = run.ended(code)
        done = len(iterations(run.run_dir))
        assert f"stopped after iteration {done}, state saved" in output
        assert run.left() == []
    finally:
        run.end()
    train(run.run_dir, *SETTINGS, f"iterations={done + 1}")
    assert len(iterations(run.run_dir)) == done + 1


@pytest.mark.slow
def test_a_signal_while_the_state_is_saved_loses_nothing(train, tmp_path):
    run = Run(tmp_path / "run")
    try:
        run.wait_until(lambda: trained(run))
        run.send(signal.SIGUSR1)
        run.wait_until(lambda: saving(run))
        run.send(signal.SIGTERM)
        run.ended(85)
        done = len(iterations(run.run_dir))
        assert run.left() == []
    finally:
        run.end()
    train(run.run_dir, *SETTINGS, f"iterations={done + 1}")
    assert len(iterations(run.run_dir)) == done + 1


@pytest.mark.parametrize("victim", ["gcs_server", pytest.param("raylet/raylet", marks=pytest.mark.slow)])
def test_a_run_whose_ray_is_killed_ends_with_one_sentence_and_its_log(train, tmp_path, victim):
    run = Run(tmp_path / "run", "checkpoint.every=1", "checkpoint.asynchronous=false")
    try:
        run.wait_until(lambda: (run.run_dir / "checkpoints/latest").exists())
        next(process for process in run.left() if victim in " ".join(process.cmdline())).kill()
        output = run.ended(86)
        assert "megatron-fipo: Ray's processes on this machine ended unexpectedly" in output
        assert "Traceback" not in output
        done = len(iterations(run.run_dir))
    finally:
        run.end()
    train(
        run.run_dir,
        *SETTINGS,
        "checkpoint.every=1",
        "checkpoint.asynchronous=false",
        f"iterations={done + 1}",
    )
    assert len(iterations(run.run_dir)) == done + 1
