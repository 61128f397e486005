"""Compares finished runs that differ in objective and seed: one plot and one table, mean and spread over seeds.

    python -m tools.compare_runs runs/fipo-1 runs/fipo-2 runs/dapo-1 runs/dapo-2 --out docs/results/countdown

Runs are grouped by `objective.name` of their config.yaml. Writes OUT.svg and OUT.png (curves: mean over seeds, band: ± one
sample standard deviation) and OUT.table.md, and prints the table. Runs whose other settings differ are refused, because then
the objective is not the only cause of a difference.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from megatron_fipo.errors import UserError
from megatron_fipo.report.run_data import Run, read_run

_MAY_DIFFER = ("objective", "seed", "run_dir", "tracking", "ray_address")
_COLORS = {"fipo": "#2563c9", "dapo": "#d9730d", "grpo": "#0f9488"}
_PANELS = (
    ("evaluation/avg_at_k", "Held-out accuracy, avg@k"),
    ("evaluation/length_mean", "Held-out response length, tokens"),
    ("policy/entropy", "Entropy, nats per token"),
)
# heading, metric, format
_COLUMNS = (
    ("avg@k", "evaluation/avg_at_k", "{:.3f}"),
    ("cons@k", "evaluation/cons_at_k", "{:.3f}"),
    ("pass@k", "evaluation/pass_at_k", "{:.3f}"),
    ("length", "evaluation/length_mean", "{:.1f}"),
    ("truncated", "evaluation/truncated", "{:.3f}"),
)


@dataclass(frozen=True)
class SeedRun:
    objective: str
    seed: int
    settings: dict[str, Any]
    """All settings that must be equal, by dotted name."""
    run: Run


def load(run_dir: Path) -> SeedRun:
    """Read one run. Raises `UserError` if its metrics, configuration or evaluations are missing."""
    run = read_run(run_dir)
    try:
        config = yaml.safe_load(run.config or "")
        objective, seed = str(config["objective"]["name"]), int(config["seed"])
    except (yaml.YAMLError, TypeError, KeyError, ValueError) as error:
        raise UserError(
            f"{run_dir}/config.yaml has no objective.name or seed; give folders of finished runs"
        ) from error
    if not run.evaluations():
        raise UserError(f"{run_dir} has no evaluation on held-out problems; omit it")
    settings = {key: value for key, value in _flat(config).items() if key.split(".")[0] not in _MAY_DIFFER}
    return SeedRun(objective, seed, settings, run)


def group_runs(runs: Sequence[SeedRun]) -> dict[str, list[SeedRun]]:
    """Objective → its runs by seed. Raises `UserError` if the runs cannot be compared."""
    first = runs[0]
    groups: dict[str, list[SeedRun]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        keys = first.settings.keys() | run.settings.keys()
        different = sorted(key for key in keys if first.settings.get(key) != run.settings.get(key))
        if different:
            raise UserError(
                f"{first.run.name} and {run.run.name} differ in {', '.join(different)}; compare runs of the same settings"
            )
        group = groups.setdefault(run.objective, [])
        if any(other.seed == run.seed for other in group):
            raise UserError(
                f"{run.run.name} repeats {run.objective} with seed {run.seed}; omit one of the two"
            )
        group.append(run)
    return dict(
        sorted(
            groups.items(),
            key=lambda item: list(_COLORS).index(item[0]) if item[0] in _COLORS else len(_COLORS),
        )
    )


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; 0 for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def curve(runs: Sequence[SeedRun], metric: str) -> tuple[list[int], list[float], list[float]]:
    """Iterations that all runs have, and mean and spread of the metric at each."""
    series = [run.run.series(metric) for run in runs]
    shared = sorted(set.intersection(*(set(one) for one in series)))
    points = [mean_and_spread([one[iteration] for one in series]) for iteration in shared]
    return shared, [mean for mean, _ in points], [spread for _, spread in points]


def table(groups: Mapping[str, Sequence[SeedRun]]) -> str:
    """Markdown: before and after per objective, `mean ± spread` over its seeds."""
    lines = [
        "| objective | seeds | iteration | " + " | ".join(heading for heading, _, _ in _COLUMNS) + " |",
        "|---|---|---|" + "---|" * len(_COLUMNS),
    ]
    for objective, runs in groups.items():
        for position in (0, -1):
            iterations = sorted({run.run.evaluations()[position].iteration for run in runs})
            if len(iterations) > 1:
                raise UserError(
                    f"the runs of {objective} end at iterations {iterations}; compare runs of the same length"
                )
            cells = [_cell(runs, position, metric, form) for _, metric, form in _COLUMNS]
            lines.append(
                f"| {objective} | {', '.join(str(run.seed) for run in runs)} | {iterations[0]} | {' | '.join(cells)} |"
            )
    return "\n".join(lines) + "\n"


def plot(groups: Mapping[str, Sequence[SeedRun]]) -> Figure:
    """One panel per metric, one curve per objective."""
    figure = Figure(figsize=(12.0, 3.6), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
    for axes, (metric, title) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        for objective, runs in groups.items():
            iterations, mean, spread = curve(runs, metric)
            if iterations:
                color = _COLORS.get(objective, "#6a7079")
                axes.plot(
                    iterations, mean, color=color, linewidth=1.6, label=f"{objective} ({len(runs)} seeds)"
                )
                low = [m - s for m, s in zip(mean, spread, strict=True)]
                high = [m + s for m, s in zip(mean, spread, strict=True)]
                axes.fill_between(iterations, low, high, color=color, alpha=0.16, linewidth=0)
        _style(axes, title)
    figure.axes[0].legend(frameon=False, loc="lower right")
    return figure


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("iteration")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _cell(runs: Sequence[SeedRun], position: int, metric: str, form: str) -> str:
    values = [run.run.evaluations()[position].values.get(metric) for run in runs]
    known = [value for value in values if value is not None]
    if len(known) < len(runs):
        return "–"
    mean, spread = mean_and_spread(known)
    return form.format(mean) + (f" ± {form.format(spread)}" if len(runs) > 1 else "")


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(settings, dict):
        return {prefix: settings}
    return {
        key: value
        for name, part in settings.items()
        for key, value in _flat(part, f"{prefix}.{name}".lstrip(".")).items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="folder of a finished run")
    parser.add_argument(
        "--out", required=True, type=Path, help="files to write, without extension: docs/results/countdown"
    )
    options = parser.parse_args(arguments)
    try:
        groups = group_runs([load(run_dir) for run_dir in options.run_dirs])
        text = table(groups)
    except UserError as error:
        print(f"compare_runs: {error}", file=sys.stderr)
        return 2
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure = plot(groups)
    figure.savefig(f"{options.out}.svg", metadata={"Date": None})
    figure.savefig(f"{options.out}.png", dpi=150)
    Path(f"{options.out}.table.md").write_text(text, encoding="utf-8")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
