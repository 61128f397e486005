"""The results of a comparison as text: CSV and JSON of every run, Markdown of means and differences. Pure and deterministic."""

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from typing import Any

from megatron_fipo.study.compare import COMPARED, PAIRED, Comparison, Difference, Mean, Variant
from megatron_fipo.study.results import MEASURES, Measure, common_settings
from megatron_fipo.study.statistics import Estimate

Row = dict[str, Any]
"""Column → text, number or None."""


def rows(comparison: Comparison) -> list[Row]:
    """A row per run, all with the same columns; the order is that of the runs.

    `accuracy` and the other measures are the last values; `accuracy@10` is that of the evaluation after iteration 10.
    """
    results = comparison.results
    grid = list(dict.fromkeys(key for result in results for key, _ in result.grid))
    packages = list(dict.fromkeys(package for result in results for package in result.versions))
    held_out = [measure for measure in MEASURES if measure.held_out]
    evaluations = sorted({i for result in results for measure in held_out for i in result.series(measure)})
    return [
        {
            "run": result.name,
            "task": result.task,
            "arm": result.arm,
            **{key: dict(result.grid).get(key) for key in grid},
            "seed": result.seed,
            "status": result.outcome.status,
            "reason": result.outcome.reason,
            "iterations": None if result.run is None else result.run.iterations,
            **{measure.column: result.final(measure) for measure in MEASURES},
            "tokens_trained": result.tokens,
            "seconds": None if result.seconds is None else round(result.seconds, 1),
            **{
                f"{measure.column}@{iteration}": result.series(measure).get(iteration)
                for measure in held_out
                for iteration in evaluations
            },
            **{
                f"settings.{key}": _plain(result.settings.get(key))
                for key in comparison.settings
                if key not in grid
            },
            **{f"version.{package}": result.versions.get(package) for package in packages},
        }
        for result in results
    ]


def to_csv(comparison: Comparison) -> str:
    """The rows as CSV; an unknown value is empty."""
    found = rows(comparison)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(found[0]) if found else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in found)
    return text.getvalue()


def to_json(comparison: Comparison) -> str:
    """The settings that all runs have, the rows, the means and the differences as JSON."""
    content = {
        "name": comparison.name,
        "settings": {key: _plain(value) for key, value in common_settings(comparison.results).items()},
        "runs": rows(comparison),
        "means": [
            {**_variant(mean.variant), **_estimate(mean), "seeds": mean.variant.seeds}
            for mean in comparison.means
        ],
        "differences": [
            {
                "task": difference.first.task,
                "first": difference.first.label,
                "second": difference.second.label,
                **_estimate(difference),
                "seeds": difference.estimate.seeds,
                "paired_by": "seeds and problems" if difference.by_problem else "seeds",
            }
            for difference in comparison.differences
        ],
    }
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def to_markdown(comparison: Comparison) -> str:
    """The tables of means and, if there are any, of differences."""
    parts = []
    for heads, body in filter(
        lambda table: table[1], (means_table(comparison), differences_table(comparison))
    ):
        parts.append("\n".join([_line(heads), "|" + "---|" * len(heads), *map(_line, body)]))
    return "\n\n".join(parts) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(markdown_text, cells)) + " |"


def markdown_text(text: str) -> str:
    """A label on one line that Markdown shows as it is, also within a table."""
    return re.sub(r"([\\|`<])", r"\\\1", " ".join(text.split()))


def means_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: a variant, a mean with interval per measure, its seeds and its last evaluation."""
    tasks = _has_tasks(comparison)
    heads = [*(["task"] if tasks else []), "arm", *(m.title for m in COMPARED), "seeds", "iteration"]
    body = []
    for variant in comparison.variants:
        of_variant = {mean.measure: mean for mean in comparison.means if mean.variant is variant}
        iterations = [mean.iteration for mean in of_variant.values() if mean.measure.held_out]
        cells = [
            text_of(of_variant[measure].estimate, measure, signed=measure.is_difference)
            if measure in of_variant
            else "–"
            for measure in COMPARED
        ]
        seeds = ", ".join(map(str, variant.seeds)) or "none complete"
        last = str(max(iterations)) if iterations else "–"
        body.append([*([variant.task] if tasks else []), variant.label, *cells, seeds, last])
    return heads, body


def differences_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: a pair of variants, a difference per measure, the number of seeds that both have, and the evaluation."""
    tasks = _has_tasks(comparison)
    heads = [*(["task"] if tasks else []), "difference", *(m.title for m in PAIRED), "seeds", "iteration"]
    pairs: dict[tuple[int, int], dict[Measure, Difference]] = {}
    for difference in comparison.differences:
        pair = (id(difference.first), id(difference.second))
        pairs.setdefault(pair, {})[difference.measure] = difference
    body = []
    for of_pair in pairs.values():
        one = next(iter(of_pair.values()))
        cells = [
            text_of(of_pair[measure].estimate, measure, signed=True) if measure in of_pair else "–"
            for measure in PAIRED
        ]
        name = f"{one.first.label} − {one.second.label}"
        evaluated = [found.iteration for found in of_pair.values() if found.measure.held_out]
        last = str(max(evaluated)) if evaluated else "–"
        body.append([*([one.first.task] if tasks else []), name, *cells, str(one.estimate.seeds), last])
    return heads, body


def text_of(estimate: Estimate, measure: Measure, *, signed: bool = False) -> str:
    """An estimate as `58.2 % [54.0, 62.1]`; without an interval the mean alone."""
    share = measure.unit == "share"

    def number(value: float) -> str:
        value = round(100 * value if share else value, measure.digits) + 0.0  # not −0
        return f"{value:{'+' if signed else ''}.{measure.digits}f}".replace("-", "−")

    unit = (" points" if signed else " %") if share else ""
    interval = (
        ""
        if estimate.low is None or estimate.high is None
        else f" [{number(estimate.low)}, {number(estimate.high)}]"
    )
    return f"{number(estimate.mean)}{unit}{interval}"


def _has_tasks(comparison: Comparison) -> bool:
    return len({variant.task for variant in comparison.variants}) > 1


def _variant(variant: Variant) -> Row:
    return {"task": variant.task, "arm": variant.label}


def _estimate(found: Mean | Difference) -> Row:
    estimate = found.estimate
    return {
        "measure": found.measure.column,
        "iteration": found.iteration,
        "mean": estimate.mean,
        "low": estimate.low,
        "high": estimate.high,
    }


def _plain(value: Any) -> Any:
    """A setting as one cell; JSON has no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(value) if isinstance(value, (list, dict)) else value


def _cell(value: Any) -> Any:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value


def settings_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: a variant, and its values of the settings in which runs differ; all of them if its own runs differ."""
    keys = comparison.settings
    tasks = _has_tasks(comparison)
    body = []
    for variant in comparison.variants:
        cells = []
        for key in keys:
            values = dict.fromkeys(
                str(_plain(result.settings.get(key, "–")))
                for result in variant.all_results
                if result.settings
            )
            cells.append(" or ".join(values) or "–")
        body.append([*([variant.task] if tasks else []), variant.label, *cells])
    return [*(["task"] if tasks else []), "arm", *keys], body
