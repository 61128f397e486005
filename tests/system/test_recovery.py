"""Ranks, writers and nodes that are lost: the run continues by itself and ends with the bits of an undisturbed one, or with 86.

The runs are deterministic and of the same layout: two data-parallel ranks and an engine.
"""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_fipo.run_dir.metrics_log import read_metrics
from tests.system.disturbances import disturbing, idle_ranks, ranks_in, trained, writers
from tests.system.kill_drill import differences
from tests.system.runs import iterations

SETTINGS = (
    "deterministic=true",
    "iterations=3",
    "checkpoint.every=1",
    "rollout.prompts_in_flight=4",
    "evaluation.every=2",
    "parallel.data_parallel_size=2",
)


@pytest.fixture(scope="module")
def undisturbed(train, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    train(run_dir, *SETTINGS)
    return run_dir


def last(run_dir: Path) -> dict[str, float]:
    return iterations(run_dir)[-1]


def recovery_s(run_dir: Path, since: float) -> float:
    """From the loss to the next trained iteration."""
    return min(record.time for record in read_metrics(run_dir) if record.time > since) - since


Victims = Callable[[], list[psutil.Process]]


@pytest.mark.parametrize(
    ("number", "victims"),
    [
        pytest.param(signal.SIGKILL, lambda: ranks_in("train_iteration"), id="update"),
        pytest.param(signal.SIGKILL, idle_ranks, id="rollout", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, lambda: ranks_in("start_save"), id="save", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, lambda: ranks_in("push_weights"), id="push", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, writers, id="writer", marks=pytest.mark.slow),
        pytest.param(
            signal.SIGSTOP, lambda: ranks_in("train_iteration"), id="hangs-in-update", marks=pytest.mark.slow
        ),
        pytest.param(
            signal.SIGSTOP, lambda: ranks_in("start_save"), id="hangs-in-save", marks=pytest.mark.slow
        ),
    ],
)
def test_a_run_that_loses_a_process_ends_with_the_same_bits(
    train, undisturbed, tmp_path, number, victims: Victims
):
    run_dir = tmp_path / "run"
    stall = ("recovery.stall_timeout_s=40",) if number == signal.SIGSTOP else ()
    with disturbing(number, lambda: victims() if trained(run_dir, 1) else []) as done:
        output = train(run_dir, *SETTINGS, *stall).stdout
    assert len(done.times) == 1
    assert differences(undisturbed, run_dir) == []
    assert last(run_dir)["recovery/restarts"] == 1
    assert "restart 1 of 3 without a new checkpoint" in output
    if stall:
        assert "has not answered its heartbeat since" in output
    print(f"recovered in {recovery_s(run_dir, done.times[0]):.1f} s")


@pytest.mark.slow
def test_without_a_checkpoint_the_run_begins_again(train, tmp_path):
    settings = (*SETTINGS, "checkpoint.every=0")
    train(tmp_path / "calm", *settings)
    run_dir = tmp_path / "run"
    with disturbing(signal.SIGKILL, lambda: ranks_in("train_iteration") if trained(run_dir, 2) else []):
        output = train(run_dir, *settings).stdout
    assert differences(tmp_path / "calm", run_dir) == []
    assert "the trainer starts again from the start of the run" in output
    assert last(run_dir)["recovery/lost_iterations"] >= 2


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["one_step_off", "fully_asynchronous"])
def test_no_reply_of_a_lost_iteration_enters_the_next_attempt(train, tmp_path, mode):
    settings = [*SETTINGS, f"rollout.mode={mode}"]
    if mode == "fully_asynchronous":
        settings += ["deterministic=false", "rollout.unfinished=continue"]
    run_dir = tmp_path / "run"
    with disturbing(signal.SIGKILL, lambda: ranks_in("train_iteration") if trained(run_dir, 1) else []):
        train(run_dir, *settings)
    assert last(run_dir)["recovery/restarts"] == 1
    assert len(iterations(run_dir)) == 3
    if mode == "one_step_off":
        train(tmp_path / "calm", *settings)
        assert differences(tmp_path / "calm", run_dir) == []


@pytest.mark.slow
def test_a_rank_that_dies_every_time_ends_the_run_with_86_and_one_sentence(train, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    start = time.monotonic()
    with disturbing(signal.SIGKILL, lambda: ranks_in("setup"), times=10) as done:
        failed = train(run_dir, *SETTINGS, "recovery.max_restarts=1", expect=86)
    assert len(done.times) >= 2
    assert failed.stderr.count("\n") == 1
    assert "died" in failed.stderr
    assert (
        "the run ends after recovery.max_restarts = 1 restarts: run the same command again" in failed.stderr
    )
    print(f"ended after {time.monotonic() - start:.1f} s")
    train(run_dir, *SETTINGS)
    assert differences(undisturbed, run_dir) == []


@pytest.mark.slow
def test_a_loss_while_the_run_stops_ends_it_with_86_and_the_same_command_resumes(
    train, undisturbed, tmp_path
):
    run_dir = tmp_path / "run"
    with (
        disturbing(
            signal.SIGUSR1,
            lambda: [psutil.Process()] if ranks_in("train_iteration") and trained(run_dir, 1) else [],
        ) as asked,
        disturbing(signal.SIGKILL, lambda: ranks_in("start_save") if asked.times else []),
    ):
        failed = train(run_dir, *SETTINGS, expect=86)
    assert "run the same command again" in failed.stderr
    train(run_dir, *SETTINGS)
    assert differences(undisturbed, run_dir) == []
