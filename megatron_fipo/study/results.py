"""What the runs of a comparison measured: the folder of each, read once, without torch."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from megatron_fipo.checkpoint.manifest import read_manifest
from megatron_fipo.errors import UserError
from megatron_fipo.report.panel import Unit
from megatron_fipo.report.run_data import Run, read_run
from megatron_fipo.run_dir.evaluation_names import MAIN, evaluation_metric
from megatron_fipo.run_dir.metrics_log import METRICS_FILE
from megatron_fipo.run_dir.run_directory import RunDirectory
from megatron_fipo.study.outcome import Outcome

MIXED = "their results are not comparable; remove these runs, or add --allow-mixed-versions"
NOT_COMPARED = ("run_dir", "seed", "tracking.", "checkpoint.", "recovery.")
"""Settings, and sections by their prefix, in which runs of one arm may differ: they do not change what is learned."""
UNKNOWN = "unknown"

Points = dict[int, float]
"""Iteration → finite value."""


def gains(points: Points) -> Points:
    """Each later value less the first one: what a run added to the model that it started from."""
    start = min(points, default=0)
    return {iteration: value - points[start] for iteration, value in points.items() if iteration > start}


def means_of_curve(points: Points) -> Points:
    """The mean height of a curve of straight lines from its first point to each later one.

    Of 0.2 at iteration 0, 0.4 at 5 and 0.4 at 15: 0.3 at 5, and (5 · 0.3 + 10 · 0.4) / 15 = 0.367 at 15.
    """
    means: Points = {}
    area = 0.0
    iterations = sorted(points)
    for before, iteration in pairwise(iterations):
        area += (iteration - before) * (points[before] + points[iteration]) / 2
        means[iteration] = area / (iteration - iterations[0])
    return means


@dataclass(frozen=True)
class Measure:
    """One number of a run: a column of the table."""

    column: str
    metric: str
    """In the run's log."""
    title: str
    """The head of its column."""
    unit: Unit = "number"
    held_out: bool = False
    """Measured by evaluations, not by every iteration."""
    compared: bool = False
    """Has a mean over seeds and differences between arms."""
    digits: int = 1
    """Decimals of these; of a share those of its percentage."""
    of_curve: Callable[[Points], Points] = dict
    """What is measured of the values logged."""

    @property
    def is_difference(self) -> bool:
        """Whether it may be below 0, also of a share."""
        return self.of_curve is gains


ACCURACY = Measure(
    "accuracy", evaluation_metric(MAIN), "accuracy, avg@k", "share", held_out=True, compared=True
)
LENGTH = Measure("length", evaluation_metric("length_mean"), "length, tokens", held_out=True, compared=True)
MEASURES = (
    ACCURACY,
    Measure("accuracy_gain", ACCURACY.metric, "gain", "share", compared=True, of_curve=gains),
    Measure(
        "accuracy_over_run",
        ACCURACY.metric,
        "mean over the run",
        "share",
        compared=True,
        of_curve=means_of_curve,
    ),
    Measure("consensus", evaluation_metric("cons_at_k"), "accuracy, cons@k", "share", held_out=True),
    Measure("pass", evaluation_metric("pass_at_k"), "pass@k", "share", held_out=True, compared=True),
    LENGTH,
    Measure("truncated", evaluation_metric("truncated"), "truncated", "share", held_out=True, compared=True),
    Measure("entropy", "policy/entropy", "entropy", compared=True, digits=3),
    Measure("kl", "policy/kl", "policy KL", compared=True, digits=5),
    Measure("sigma", "policy/sigma_log_ratio", "σ of the log-ratio, first mini-step"),
    Measure("influence_mean", "influence/mean", "influence weight, mean"),
    Measure("influence_min", "influence/min", "influence weight, lowest"),
    Measure("influence_max", "influence/max", "influence weight, highest"),
    Measure("influence_raw_mean", "influence/raw_mean", "mean of exp F before clipping"),
    Measure("influence_at_low", "influence/share_at_low", "weights at the lower bound", "share"),
    Measure("influence_at_high", "influence/share_at_high", "weights at the upper bound", "share"),
)
"""In the order of the table's columns."""


@dataclass(frozen=True)
class Result:
    """A run and what it measured."""

    name: str
    task: str
    arm: str
    grid: tuple[tuple[str, str], ...]
    seed: int
    outcome: Outcome
    versions: dict[str, str]
    """Of the software that trained it last; empty without a checkpoint."""
    run_dir: Path
    run: Run | None = field(repr=False)
    """Without samples; None if nothing was logged."""
    settings: dict[str, Any] = field(repr=False)
    """By dotted key; empty if the run saved none."""

    @property
    def counts(self) -> bool:
        """Whether means and differences include it."""
        return self.outcome.status == "complete" and self.run is not None

    def series(self, measure: Measure) -> dict[int, float]:
        """Iteration → value, finite ones only."""
        values = {} if self.run is None else self.run.series(measure.metric)
        finite = {iteration: value for iteration, value in values.items() if math.isfinite(value)}
        return measure.of_curve(finite)

    def final(self, measure: Measure) -> float | None:
        """The last value."""
        return next(reversed(self.series(measure).values()), None)

    @property
    def tokens(self) -> float | None:
        """Response tokens trained on."""
        return self._total("tokens/used")

    @property
    def seconds(self) -> float | None:
        """Of iterations and evaluations; starting and saving the model are not part of it."""
        total = self._total("time/total")
        if total is None or self.run is None:
            return None
        evaluations = self.run.series("evaluation/seconds")
        # Other evaluations are part of the iteration after them.
        outside = {0, self.run.iterations}
        return total + sum(
            value for iteration, value in evaluations.items() if iteration in outside and math.isfinite(value)
        )

    def _total(self, metric: str) -> float | None:
        values = [] if self.run is None else list(self.run.series(metric).values())
        return sum(values) if values and all(map(math.isfinite, values)) else None


def read_result(
    run_dir: Path,
    outcome: Outcome,
    *,
    name: str,
    task: str = "",
    arm: str = "",
    grid: tuple[tuple[str, str], ...] = (),
    seed: int | None = None,
) -> Result:
    """A run's folder, which may be missing. Without `seed` it is that of the run's settings. Raises UserError."""
    run = read_run(run_dir, with_samples=False) if _has_metrics(run_dir) else None
    settings = {} if run is None else _flat(_settings(run, run_dir))
    if seed is None:
        try:
            seed = int(settings["seed"])
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{run_dir} has no metrics, or no seed in its config.yaml; leave it out"
            ) from None
    return Result(
        name,
        task,
        arm,
        grid,
        seed,
        outcome,
        stored_versions(run_dir),
        run_dir,
        run,
        settings,
    )


def confirmed(result: Result) -> Result:
    """The same, not `complete` if the run's folder lacks iterations: it may have been removed or cut since."""
    if result.outcome.status != "complete":
        return result
    wanted = result.settings.get("iterations")
    if result.run is None:
        outcome = Outcome("missing", f"its folder has no {METRICS_FILE}")
    elif isinstance(wanted, int) and result.run.iterations < wanted:
        outcome = Outcome("stopped", f"its {METRICS_FILE} has {result.run.iterations} of {wanted} iterations")
    else:
        return result
    return replace(result, outcome=outcome)


def stored_versions(run_dir: Path) -> dict[str, str]:
    """Versions in the newest checkpoint of a run; empty without one."""
    latest = RunDirectory(run_dir).latest()
    if latest is None:
        return {}
    versions = read_manifest(latest).info.get("versions")
    known = versions.items() if isinstance(versions, dict) else ()
    return {name: version for name, version in known if isinstance(version, str)}


def version_differences(versions: Sequence[Mapping[str, str]]) -> list[str]:
    """For each package whose version is not the same in all: its name and its versions, such as `torch 2.12.0 and 2.13.0`."""
    packages = dict.fromkeys(package for found in versions for package in found)
    values = {package: {found.get(package, UNKNOWN) for found in versions} for package in packages}
    return [f"{package} {' and '.join(sorted(found))}" for package, found in values.items() if len(found) > 1]


def refuse_mixed(results: Iterable[Result]) -> None:
    """Raise UserError if the runs have different versions."""
    known = [result.versions for result in results if result.versions]
    if different := version_differences(known):
        raise UserError(f"the runs were made by different versions ({'; '.join(different)}), so {MIXED}")


def differing_settings(results: Sequence[Result]) -> list[str]:
    """Dotted keys in which runs differ, except those that runs of one arm may differ in, in the order of the settings."""
    known = [result.settings for result in results if result.settings]
    keys = dict.fromkeys(key for settings in known for key in settings if not key.startswith(NOT_COMPARED))
    return [key for key in keys if any(settings.get(key) != known[0].get(key) for settings in known)]


def common_settings(results: Sequence[Result]) -> dict[str, Any]:
    """Dotted key → value of the settings that are the same in all runs."""
    known = [result.settings for result in results if result.settings]
    shared = known[0].items() if known else ()
    return {
        key: value
        for key, value in shared
        if all(key in settings and settings[key] == value for settings in known)
    }


def _has_metrics(run_dir: Path) -> bool:
    path = run_dir / METRICS_FILE
    return path.is_file() and path.stat().st_size > 0


def _settings(run: Run, run_dir: Path) -> Any:
    try:
        return yaml.safe_load(run.config or "")
    except (yaml.YAMLError, RecursionError):
        raise UserError(
            f"{run_dir}/config.yaml is not YAML; restore it from a checkpoint of the run"
        ) from None


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Settings by dotted key."""
    if not isinstance(settings, dict) or not settings:
        return {prefix: settings} if prefix else {}
    return {
        key: value
        for name, part in settings.items()
        for key, value in _flat(part, f"{prefix}.{name}".lstrip(".")).items()
    }
