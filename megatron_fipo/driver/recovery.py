"""Losses within a run: what is lost is started again and the last checkpoint resumed, a limited number of times."""

from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_fipo.config import RecoveryConfig
from megatron_fipo.driver.cluster_loss import ClusterLostError
from megatron_fipo.driver.placement import NoSpareNodeError
from megatron_fipo.driver.stop import Stop
from megatron_fipo.errors import LostError
from megatron_fipo.run_dir.losses import LOST_ITERATIONS, RESTARTS
from megatron_fipo.run_dir.metrics_log import Record


class Recovery:
    """Runs attempts until one succeeds, and counts for the complete run, over all its processes."""

    def __init__(self, config: RecoveryConfig, stop: Stop, log: Callable[[str], None]) -> None:
        self._config = config
        self._stop = stop
        self._log = log
        self._resumed = False
        self._restarts = 0
        self._lost_iterations = 0

    def run(self, attempt: Callable[[], None], latest: Callable[[], Path | None]) -> None:
        """Call `attempt`, and again after a loss; `latest` is the newest checkpoint.

        Raises `LostError` if Ray itself or a node without a spare is lost, if the run is to stop anyway, and after
        `recovery.max_restarts` losses without a new checkpoint in between.
        """
        since_checkpoint, checkpoint = 0, latest()
        while True:
            try:
                return attempt()
            except (ClusterLostError, NoSpareNodeError):
                raise
            except LostError as error:
                if (newest := latest()) != checkpoint:
                    since_checkpoint, checkpoint = 0, newest
                if self._stop.requested() or since_checkpoint == self._config.max_restarts:
                    raise self._given_up(error) from error
                since_checkpoint += 1
                self._restarts += 1
                start = "the start of the run" if newest is None else newest.name
                self._log(
                    f"{error}; the trainer starts again from {start} (restart {since_checkpoint} of "
                    f"{self._config.max_restarts} without a new checkpoint)"
                )

    def resumes(self, records: Sequence[Record], iteration: int) -> None:
        """The run resumes after `iteration` (0: at its start), with what `records` have of later ones lost."""
        logged = [record for record in records if record.kind == "iteration"]
        if logged and not self._resumed:
            values = logged[-1].values
            self._restarts += int(values.get(RESTARTS, 0))
            self._lost_iterations += int(values.get(LOST_ITERATIONS, 0))
        self._resumed = True
        self._lost_iterations += sum(record.iteration > iteration for record in logged)

    def values(self) -> dict[str, float]:
        """The metrics of an iteration."""
        return {RESTARTS: float(self._restarts), LOST_ITERATIONS: float(self._lost_iterations)}

    def _given_up(self, error: LostError) -> LostError:
        tried = (
            ""
            if self._stop.requested()
            else f" after recovery.max_restarts = {self._config.max_restarts} restarts"
        )
        return LostError(
            f"{error}; the run ends{tried}: run the same command again, which resumes from the last checkpoint"
        )
