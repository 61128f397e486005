"""Mirrors of the run's metrics in Weights & Biases and TensorBoard.

`metrics.jsonl` is the run's own record; these are for people who watch many runs in one place. Both are optional and
imported only if configured. A tracker that fails, at the start or later, is reported once and disabled; training
continues.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_fipo.config import TrackingConfig
from megatron_fipo.errors import first_line
from megatron_fipo.run_dir.metrics_log import Kind

WANDB_RUN_ID_FILE = "wandb_run_id"
_ONLINE_TIMEOUT_S = 15
"""wandb waits 90 s by default, too long for a run without a network."""

_logger = logging.getLogger(__name__)


class _Tracker(Protocol):
    def log(self, iteration: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """The trackers that `config` asks for and that work.

    `run_dir` has their files: `wandb/`, `tensorboard/` and `wandb_run_id`, with which a resumed run resumes its wandb run.
    `resolved_config` is stored with the wandb run. `log` receives one sentence for each failure.
    """

    def __init__(
        self,
        config: TrackingConfig,
        run_dir: Path,
        resolved_config: dict[str, Any],
        run_name: str,
        log: Callable[[str], None] = _logger.warning,
    ) -> None:
        self._report = log
        self._trackers: dict[str, _Tracker] = {}
        if config.wandb != "disabled":
            self._start("wandb", lambda: _Wandb(config, run_dir, resolved_config, run_name, log))
        if config.tensorboard:
            self._start("TensorBoard", lambda: _TensorBoard(run_dir / "tensorboard"))

    def log(self, kind: Kind, iteration: int, values: Mapping[str, float]) -> None:
        """Send the values of one iteration or evaluation. Their names (`evaluation/...`) already show the kind."""
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.log(iteration, values)
            except Exception as error:
                self._lose(name, error)

    def close(self) -> None:
        """Write out what is buffered. Online, wandb finishes its upload here."""
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.close()
            except Exception as error:
                self._lose(name, error)
        self._trackers.clear()

    def _start(self, name: str, start: Callable[[], _Tracker]) -> None:
        try:
            self._trackers[name] = start()
        except Exception as error:
            self._lose(name, error)

    def _lose(self, name: str, error: Exception) -> None:
        self._trackers.pop(name, None)
        self._report(
            f"{name} does not work ({first_line(error)}); training continues without it, metrics.jsonl has everything"
        )


class _Wandb:
    def __init__(
        self,
        config: TrackingConfig,
        run_dir: Path,
        resolved_config: dict[str, Any],
        run_name: str,
        log: Callable[[str], None],
    ) -> None:
        import wandb

        id_file = run_dir / WANDB_RUN_ID_FILE
        run_id = id_file.read_text().strip() if id_file.exists() else None

        def start(online: bool) -> Any:
            return wandb.init(
                project=config.wandb_project,
                name=run_name,
                id=run_id,
                dir=run_dir,
                config=resolved_config,
                mode="online" if online else "offline",
                resume="allow" if online else None,
                settings=wandb.Settings(silent=True, console="off", init_timeout=_ONLINE_TIMEOUT_S),
            )

        online = config.wandb == "online"
        if online and not wandb.login(prompt=False, verify=False):
            log(
                "wandb has no API key, so this run is recorded offline; run `wandb login`, then upload it with `wandb sync`"
            )
            online = False
        try:
            self._run = start(online)
        except wandb.errors.CommError as error:
            if not online:
                raise
            log(
                f"wandb cannot be reached ({first_line(error)}), so this run is recorded offline; upload it with `wandb sync`"
            )
            self._run = start(online=False)
        id_file.write_text(self._run.id + "\n")
        # A separate axis, not wandb's step counter, which refuses steps that a resumed run logs again.
        self._run.define_metric("iteration", hidden=True)
        self._run.define_metric("*", step_metric="iteration")

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        self._run.log({"iteration": iteration, **values})

    def close(self) -> None:
        self._run.finish()


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._open: Callable[[int], SummaryWriter] = lambda first: SummaryWriter(
            str(folder), purge_step=first
        )
        self._writer: SummaryWriter | None = None

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        if (
            self._writer is None
        ):  # a resumed run hides what the interrupted one wrote for this and later iterations
            self._writer = self._open(iteration)
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
