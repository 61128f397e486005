"""The data of a report: what a run's folder contains, read once."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from megatron_fipo.errors import UserError
from megatron_fipo.report.samples import choose_samples
from megatron_fipo.run_dir import CONFIG_FILE
from megatron_fipo.run_dir.evaluation_names import sets_in
from megatron_fipo.run_dir.metrics_log import Record, Sample, read_metrics

REWARD = "reward/"
"""Begins the metrics of rewards: `reward/mean`, and `reward/NAME` of each number that the reward function names."""


@dataclass(frozen=True)
class Run:
    """A run's metrics by iteration, samples and configuration.

    Names of held-out metrics begin with `evaluation/`; all others belong to training iterations.
    """

    name: str
    records: list[Record]
    """At least one."""
    samples: list[Sample] = field(default_factory=list)
    """The few to show."""
    config: str | None = None
    """The resolved configuration as YAML text; None if the run saved none."""

    def series(self, name: str) -> dict[int, float]:
        """Iteration → value of one metric, in ascending order; empty if the run does not have it.

        NaN where a line lacks it and others of its kind have it. A later line replaces an earlier one of the same
        iteration.
        """
        kinds = {record.kind for record in self.records if name in record.values}
        values = {
            record.iteration: record.values.get(name, math.nan)
            for record in self.records
            if record.kind in kinds
        }
        return dict(sorted(values.items()))

    def evaluations(self) -> list[Record]:
        """In ascending order of iterations."""
        return sorted(
            (record for record in self.records if record.kind == "evaluation"),
            key=lambda record: record.iteration,
        )

    def evaluation_sets(self) -> list[str]:
        """The sets that any evaluation measured, oldest first; empty for a run of an earlier version."""
        return list(dict.fromkeys(name for record in self.evaluations() for name in sets_in(record.values)))

    def reward_numbers(self) -> list[str]:
        """The metrics of numbers that the reward function names, in order."""
        names = {name for record in self.records for name in record.values if name.startswith(REWARD)}
        return sorted(names - {f"{REWARD}mean"})

    @property
    def iterations(self) -> int:
        return max(record.iteration for record in self.records)

    def setting(self, key: str) -> str | None:
        """A configured value by its dotted name, as text; None if it or the configuration cannot be read."""
        try:
            value = yaml.safe_load(self.config or "")
        except yaml.YAMLError:
            return None
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return None if value is None else str(value)


def read_run(run_dir: Path, *, with_samples: bool = True) -> Run:
    """Read a run's folder, on request without its samples, whose file is large. Raises `UserError` if it has no metrics."""
    records = read_metrics(run_dir)
    if not records:
        raise UserError(
            f"{run_dir} has no metrics to report; give the folder of a run that has finished an iteration"
        )
    config_path = run_dir / CONFIG_FILE
    config = config_path.read_text(encoding="utf-8", errors="replace") if config_path.exists() else None
    samples = choose_samples(run_dir) if with_samples else []
    return Run(run_dir.resolve().name, records, samples, config)
