"""SIGUSR1 in each phase of a run: it ends with 85, has saved at once, and the resumed run ends with the bits of a calm one."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.disturbances import disturbing, myself_if, ranks_in, titled, trained
from tests.system.runs import iterations, same_numbers, weights
from tests.system.slow_run import slow_engines

pytestmark = pytest.mark.slow

SETTINGS = (
    "deterministic=true",
    "iterations=3",
    "checkpoint.every=0",
    "rollout.prompts_in_flight=4",
    "evaluation.every=1",
    "evaluation.before_training=false",
)


@pytest.fixture(scope="module")
def calm(train, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("calm") / "run"
    train(run_dir, *SETTINGS)
    return run_dir


def evaluated(run_dir: Path) -> int:
    if not (run_dir / "metrics.jsonl").exists():
        return 0
    return sum(json.loads(line)["kind"] == "evaluation" for line in open(run_dir / "metrics.jsonl"))


def saved(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("iteration_*"))


def generating() -> bool:
    return bool(titled("ray::SlowEngine.generate"))


def in_rollout(run_dir: Path) -> bool:
    return generating() and trained(run_dir, 1) and evaluated(run_dir) == 1


def in_evaluation(run_dir: Path) -> bool:
    return generating() and trained(run_dir, 1) and evaluated(run_dir) == 0


def in_method(method: str, after: int) -> Callable[[Path], bool]:
    return lambda run_dir: trained(run_dir, after) and bool(ranks_in(method))


def check_equal(calm: Path, run_dir: Path) -> None:
    """Every bit, except how many tokens an abandoned rollout dropped."""
    assert weights(calm) == weights(run_dir)
    for one, other in zip(iterations(calm), iterations(run_dir), strict=True):
        assert same_numbers(one, other, "engines/", "scorers/")


Phase = Callable[[Path], bool]


@pytest.mark.parametrize(
    ("phase", "done"),
    [
        pytest.param(in_rollout, 1, id="rollout"),
        pytest.param(in_evaluation, 1, id="evaluation"),
        pytest.param(in_method("train_iteration", 1), 2, id="update"),
        pytest.param(lambda run_dir: not trained(run_dir, 1) and bool(ranks_in("setup")), 0, id="start"),
        pytest.param(
            lambda run_dir: bool(titled("ray::SlowEngine")) and not trained(run_dir, 1), 0, id="engine-start"
        ),
    ],
)
def test_a_signal_in_a_phase_saves_at_once_and_costs_no_bit(train, calm, tmp_path, phase: Phase, done: int):
    run_dir = tmp_path / "run"
    with (
        slow_engines(),
        disturbing(signal.SIGUSR1, lambda: myself_if(lambda: phase(run_dir))) as sent,
    ):
        train(run_dir, *SETTINGS, expect=85)
    assert len(sent.times) == 1
    assert saved(run_dir) == [f"iteration_{done:06d}"] * (done > 0)
    assert not trained(run_dir, done + 1)
    train(run_dir, *SETTINGS)
    check_equal(calm, run_dir)
    assert iterations(run_dir)[-1]["recovery/lost_iterations"] == 0


@pytest.mark.parametrize("method", ["push_weights", "start_save"])
def test_a_signal_in_a_push_or_a_save_waits_for_its_end(train, calm, tmp_path, method):
    run_dir, settings = tmp_path / "run", [*SETTINGS, "checkpoint.every=1"]
    with disturbing(signal.SIGUSR1, lambda: myself_if(lambda: in_method(method, 1)(run_dir))):
        train(run_dir, *settings, expect=85)
    (name,) = saved(run_dir)
    assert name == f"iteration_{len(iterations(run_dir)):06d}"
    train(run_dir, *settings)
    check_equal(calm, run_dir)


def test_partial_responses_of_an_abandoned_rollout_are_kept_with_continue(train, tmp_path):
    run_dir = tmp_path / "run"
    settings = (*SETTINGS[1:], "rollout.unfinished=continue", "rollout.max_staleness=3")
    with (
        slow_engines(),
        disturbing(signal.SIGUSR1, lambda: myself_if(lambda: in_rollout(run_dir))),
    ):
        train(run_dir, *settings, expect=85)
    groups = json.loads((run_dir / "checkpoints/latest/loop.json").read_text())["rollout"]["groups"]
    assert groups, "responses were unfinished"
    train(run_dir, *settings)
    assert len(iterations(run_dir)) == 3
