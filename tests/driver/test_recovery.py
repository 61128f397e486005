"""Losses are recovered from a limited number of times between two checkpoints, and counted over the complete run."""

from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.config import RecoveryConfig
from megatron_fipo.driver.cluster_loss import ClusterLostError
from megatron_fipo.driver.placement import NoSpareNodeError
from megatron_fipo.driver.recovery import Recovery
from megatron_fipo.errors import LostError, UserError
from megatron_fipo.run_dir.metrics_log import Record


class Run:
    """Attempts that end as `events` tell: an error to raise after a number of new checkpoints."""

    def __init__(
        self, *events: tuple[int, Exception | None], stops: bool = False, max_restarts: int = 2
    ) -> None:
        self.events = list(events)
        self.attempts = self.saved = 0
        self.lines: list[str] = []
        stop: Any = type("Stop", (), {"requested": lambda self: "SIGTERM" if stops else None})()
        self.recovery = Recovery(RecoveryConfig(max_restarts=max_restarts), stop, self.lines.append)

    def attempt(self) -> None:
        new, error = self.events[self.attempts]
        self.attempts += 1
        self.saved += new
        if error is not None:
            raise error

    def latest(self) -> Path | None:
        return Path(f"iteration_{self.saved:06d}") if self.saved else None

    def run(self) -> None:
        self.recovery.run(self.attempt, self.latest)


LOST = LostError("rank 3 died")


def test_each_new_checkpoint_gives_all_restarts_again():
    run = Run((0, LOST), (0, LOST), (1, LOST), (0, LOST), (2, LOST), (0, LOST), (1, None))
    run.run()
    assert run.attempts == 7
    assert run.recovery.values()["recovery/restarts"] == 6
    assert "starts again from the start of the run (restart 1 of 2" in run.lines[0]
    assert "starts again from iteration_000001 (restart 1 of 2" in run.lines[2]


def test_the_same_loss_again_and_again_ends_the_run_with_one_sentence():
    run = Run((1, LOST), (0, LOST), (0, LOST), (0, None))
    with pytest.raises(
        LostError, match=r"^rank 3 died; the run ends after recovery.max_restarts = 2 restarts: run the same"
    ):
        run.run()
    assert run.attempts == 3


@pytest.mark.parametrize(
    ("error", "stops", "kind"),
    [
        (ClusterLostError(), False, ClusterLostError),
        (NoSpareNodeError("a node was lost"), False, NoSpareNodeError),
        (UserError("fix it"), False, UserError),
        (ZeroDivisionError(), False, ZeroDivisionError),
        (LOST, True, LostError),
    ],
)
def test_what_a_restart_does_not_help_ends_the_run_at_once(error, stops, kind):
    run = Run((0, error), (0, None), stops=stops)
    with pytest.raises(kind):
        run.run()
    assert run.attempts == 1


def records(*iterations: int, restarts: float = 0, lost: float = 0) -> list[Record]:
    values = {"recovery/restarts": restarts, "recovery/lost_iterations": lost}
    return [Record("iteration", iteration, 0.0, values) for iteration in iterations]


def test_iterations_that_are_trained_again_are_counted_over_all_processes():
    recovery = Run().recovery
    recovery.resumes([*records(1, 2, 3, 4, restarts=2, lost=5), Record("evaluation", 4, 0.0, {})], 2)
    assert recovery.values() == {"recovery/restarts": 2, "recovery/lost_iterations": 7}
    recovery.resumes(records(1, 2, 3, restarts=2, lost=7), 2)
    assert recovery.values() == {"recovery/restarts": 2, "recovery/lost_iterations": 8}
    recovery.resumes(records(1, 2, restarts=2, lost=8), 0)
    assert recovery.values() == {"recovery/restarts": 2, "recovery/lost_iterations": 10}
    assert Run().recovery.values() == {"recovery/restarts": 0, "recovery/lost_iterations": 0}


def test_an_older_log_has_no_counts():
    recovery = Run().recovery
    recovery.resumes([Record("iteration", 1, 0.0, {})], 1)
    assert recovery.values() == {"recovery/restarts": 0, "recovery/lost_iterations": 0}
