"""The page of a comparison: tables, figures and differences of settings, in one HTML file without scripts or external files."""

from collections.abc import Sequence
from html import escape

from megatron_fipo.report.page import html_page, html_table
from megatron_fipo.study.compare import Comparison, Variant
from megatron_fipo.study.curves import figures, styles
from megatron_fipo.study.results import ACCURACY, LENGTH, Result, version_differences
from megatron_fipo.study.statistics import LEVEL
from megatron_fipo.study.table import differences_table, means_table, settings_table

METHOD = (
    "Brackets are 95 % intervals of the mean over seeds, by bootstrap and widened for few seeds; with one seed there is none. "
    "An interval says how much the mean would vary with other seeds of the same study, not with another task or model."
)
PAIRED = (
    "Differences are paired: of the same seeds, and for accuracy and length also of the same held-out problems where the runs "
    "have the tables of their evaluations; seeds and problems are resampled. If an interval contains 0, the runs do not show a difference. "
    "The intervals are not corrected for the number of pairs: of twenty without a difference, one excludes 0."
)


def render_page(comparison: Comparison) -> str:
    """The complete page."""
    assert LEVEL == 0.95  # as METHOD says
    body = "".join(
        (
            _header(comparison),
            _section("Result", _table(means_table(comparison)), METHOD),
            _differences(comparison),
            *(_figures(comparison, task) for task in _tasks(comparison)),
            _runs(comparison.results),
            _settings(comparison),
            _versions(comparison.results),
        )
    )
    return html_page(comparison.name, body)


def _header(comparison: Comparison) -> str:
    results, done = comparison.results, sum(result.counts for result in comparison.results)
    facts = [f"{len(comparison.variants)} arms", f"{len(results)} runs", f"{done} complete"]
    if len(_tasks(comparison)) > 1:
        facts.insert(0, f"{len(_tasks(comparison))} tasks")
    return f'<header><h1>{escape(comparison.name)}</h1><p class="facts">{" · ".join(facts)}</p></header>'


def _section(title: str, content: str, note: str = "") -> str:
    after = f"<p>{escape(note)}</p>" if note else ""
    return f'<section class="results"><h2>{escape(title)}</h2>{content}{after}</section>'


def _table(table: tuple[list[str], list[list[str]]]) -> str:
    """With intervals on a second line of their cells."""
    heads, rows = table
    return html_table(heads, [[cell.replace(" [", "\n[") for cell in row] for row in rows])


def _differences(comparison: Comparison) -> str:
    if not comparison.differences:
        note = "No two arms that differ in one thing have complete runs of the same seed."
        return f'<section><h2>Differences</h2><p class="absent">{note}</p></section>'
    return _section("Differences", _table(differences_table(comparison)), PAIRED)


def _tasks(comparison: Comparison) -> list[str]:
    return list(dict.fromkeys(variant.task for variant in comparison.variants))


def _figures(comparison: Comparison, task: str) -> str:
    variants: Sequence[Variant] = [variant for variant in comparison.variants if variant.task == task]
    title = f"Curves, {task}" if len(_tasks(comparison)) > 1 else "Curves"
    drawn = figures(variants, styles(variants))
    if not drawn:
        return f'<section><h2>{escape(title)}</h2><p class="absent">No run is complete.</p></section>'
    note = (
        "Thin lines are runs; thick lines are means over the seeds of an arm, and shaded areas their 95 % intervals, cut where they "
        "extend far beyond the runs. Numbers are the last means."
    )
    return f'<section><h2>{escape(title)}</h2><p class="absent">{note}</p><div class="grid">{drawn}</div></section>'


def _runs(results: Sequence[Result]) -> str:
    heads = ["run", "status", "iterations", "accuracy", "length", "tokens trained", "minutes"]
    rows = [
        [
            result.name,
            result.outcome.status,
            "–" if result.run is None else f"{result.run.iterations:,}",
            _number(result.final(ACCURACY), 100, " %"),
            _number(result.final(LENGTH)),
            "–" if result.tokens is None else f"{result.tokens:,.0f}",
            _number(result.seconds, 1 / 60),
        ]
        for result in results
    ]
    reasons = "".join(
        f"<li><b>{escape(result.name)}</b> {result.outcome.status}: {escape(result.outcome.reason)}</li>"
        for result in results
        if result.outcome.reason
    )
    listed = f"<ul>{reasons}</ul>" if reasons else ""
    table = f"<details><summary>All {len(results)} runs</summary>{html_table(heads, rows)}</details>"
    note = "Only complete runs enter means, differences and curves. Minutes are those of iterations and evaluations."
    return _section("Runs", listed + table, note)


def _settings(comparison: Comparison) -> str:
    if not comparison.settings:
        note = "The runs differ in no setting but the seed."
        return f'<section><h2>Settings</h2><p class="absent">{note}</p></section>'
    return _section("Settings in which runs differ", html_table(*settings_table(comparison)))


def _versions(results: Sequence[Result]) -> str:
    known = [result for result in results if result.versions]
    if not known:
        return ""
    different = version_differences([result.versions for result in known])
    if not different:
        rows = [[package, version] for package, version in known[0].versions.items()]
        return _section("Versions", html_table(["package", "version"], rows))
    packages = list(dict.fromkeys(package for result in known for package in result.versions))
    rows = [[result.name, *(result.versions.get(package, "–") for package in packages)] for result in known]
    warning = f"The runs were made by different versions: {'; '.join(different)}."
    return _section("Versions", html_table(["run", *packages], rows), warning)


def _number(value: float | None, factor: float = 1.0, unit: str = "") -> str:
    return "–" if value is None else f"{factor * value:,.1f}{unit}"
