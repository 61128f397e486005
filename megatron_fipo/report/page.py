"""The report as one HTML page without scripts or external files, for light and dark screens and for print."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape

from megatron_fipo.report.chart import draw, panel_series
from megatron_fipo.report.figures import sections
from megatron_fipo.report.panel import Panel, Section, Unit
from megatron_fipo.report.run_data import Run
from megatron_fipo.report.samples import render_samples
from megatron_fipo.report.style import STYLE
from megatron_fipo.run_dir.evaluation_names import evaluation_metric
from megatron_fipo.run_dir.losses import losses_sentence
from megatron_fipo.run_dir.metrics_log import Record

# title, metric of an evaluation set, whether it is a share
_HEADLINE = (
    ("Accuracy, avg@{k}", "avg_at_k", True),
    ("Accuracy, cons@{k}", "cons_at_k", True),
    ("Accuracy, pass@{k}", "pass_at_k", True),
    ("Response length, mean", "length_mean", False),
    ("Response length, median", "length_median", False),
    ("Truncated", "truncated", True),
)


def render_page(run: Run) -> str:
    """The complete HTML page."""
    body = "".join(
        (
            _header(run),
            _headline(run),
            *(_section(section, run) for section in sections(run.evaluation_sets(), run.reward_numbers())),
            f"<section><h2>Responses, token by token</h2>{render_samples(run.samples)}</section>",
            _configuration(run),
        )
    )
    return html_page(run.name, body)


def html_page(title: str, body: str) -> str:
    """A complete page in the style of the report, from HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)} · Megatron-FIPO</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def html_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table from texts; the first cell of a row is its heading."""
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join(
        f"<tr><th>{escape(row[0])}</th>" + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def html_figure(title: str, keys: Sequence[str], svg: str, caption: str) -> str:
    """A figure of the page. `keys` are those of `key`; title and caption are text."""
    return (
        f'<figure><h3>{escape(title)}</h3><p class="keys">{"".join(keys)}</p>{svg}'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def key(mark: str, color: str, label: str) -> str:
    """An entry of a figure's legend: `mark` is line, dashes, area or band; `label` is HTML."""
    return f'<span><i class="{mark}" style="--c:var(--{color})"></i>{label}</span>'


def _header(run: Run) -> str:
    objective, model = run.setting("objective.name"), run.setting("model.path")
    times = [record.time for record in run.records]
    start = datetime.fromtimestamp(min(times), UTC)
    facts = [
        f"{run.iterations:,} iterations",
        f"{start:%Y-%m-%d %H:%M} UTC",
        _minutes(max(times) - min(times)),
    ]
    trained = [record.values for record in run.records if record.kind == "iteration"]
    if trained and (losses := losses_sentence(trained[-1])) is not None:
        facts.append(losses)
    if model:
        facts.insert(0, f"model {escape(model)}")
    if objective:
        facts.insert(0, f"<b>{escape(objective.upper())}</b>")
    return f'<header><h1>{escape(run.name)}</h1><p class="facts">{" · ".join(facts)}</p></header>'


def _headline(run: Run) -> str:
    evaluations = run.evaluations()
    if not evaluations:
        return (
            '<p class="absent">This run was never evaluated on held-out problems, '
            "so accuracy before and after training is unknown.</p>"
        )
    before, after = evaluations[0], evaluations[-1]
    k, problems = (after.values.get(evaluation_metric(name), math.nan) for name in ("k", "problems"))
    known_k = f"{k:.0f}" if math.isfinite(k) else "k"
    rows = "".join(
        _headline_row(of_set, title.format(k=known_k), before, after, name, share)
        for of_set, prefix in _headline_sets(run.evaluation_sets())
        for title, metric, share in _HEADLINE
        if _has(before, name := evaluation_metric(metric, prefix)) or _has(after, name)
    )
    once = before is after
    heads = (
        f"<th>iteration {after.iteration}</th>"
        if once
        else f"<th>{_when(before)}</th><th>{_when(after)}</th><th>change</th>"
    )
    measured = f"{problems:,.0f} held-out problems" if math.isfinite(problems) else "the held-out problems"
    responses = "one response" if k == 1 else f"{known_k} responses"
    return (
        f'<section class="headline"><h2>Held-out problems{"" if once else ", before and after"}</h2>'
        '<div class="scroll">'
        f"<table><thead><tr><th></th><th></th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
        f"<p>Measured on {measured}, with {responses} each. avg@{known_k} is the "
        f"mean accuracy of a response, cons@{known_k} the accuracy of the answer given by most responses, "
        f"pass@{known_k} the share of problems that at least one response solves.</p></section>"
    )


def _headline_sets(sets: Sequence[str]) -> list[tuple[str, str | None]]:
    """Title and set of each part of the table; None is over all sets."""
    over_all = [("" if not sets else f"mean of {len(sets)} sets", None)] if len(sets) != 1 else []
    return [*over_all, *((name, name) for name in sets)]


def _headline_row(of_set: str, title: str, before: Record, after: Record, name: str, share: bool) -> str:
    heads = f"<tr><th>{escape(of_set)}</th><th>{title}</th>"
    old, new = before.values.get(name, math.nan), after.values.get(name, math.nan)
    if before is after:
        return f"{heads}<td><b>{_headline_number(new, share)}</b></td></tr>"
    change = (
        "–"
        if math.isnan(new - old)
        else (f"{100 * (new - old):+.1f} points" if share else f"{new - old:+,.1f} tokens")
    )
    cells = (
        f"<td>{_headline_number(old, share)}</td><td><b>{_headline_number(new, share)}</b></td>"
        f"<td>{change.replace('-', '−')}</td>"
    )
    return f"{heads}{cells}</tr>"


def _section(section: Section, run: Run) -> str:
    drawn = [(panel, draw(panel, run)) for panel in section.panels]
    figures = "".join(_figure(panel, svg, run) for panel, svg in drawn if svg is not None)
    absent = [panel.title for panel, svg in drawn if svg is None]
    note = (
        f'<p class="absent">Left out, because this run has no such data: {escape(", ".join(absent))}.</p>'
        if absent
        else ""
    )
    grid = f'<div class="grid">{figures}</div>' if figures else ""
    return f"<section><h2>{escape(section.title)}</h2>{grid}{note}</section>"


def _figure(panel: Panel, svg: str, run: Run) -> str:
    series = panel_series(panel, run)
    keys, notes = [], []
    for line in panel.lines:
        if line.metric in series:
            last = [value for value in series[line.metric].values() if math.isfinite(value)][-1]
            mark = "area" if panel.stacked else ("dashes" if line.dashed else "line")
            keys.append(key(mark, line.color, f"{escape(line.label)} <b>{_number(last, panel.unit)}</b>"))
            notes.append(line.note)
    if panel.band and panel.band.low in series and panel.band.high in series:
        keys.append(key("band", panel.band.color, escape(panel.band.label)))
    unit = "" if panel.unit in ("number", "share") else f", {panel.unit}"
    caption = " ".join(filter(None, (panel.caption, *notes)))
    return html_figure(f"{panel.title}{unit}", keys, svg, caption)


def _configuration(run: Run) -> str:
    if run.config is None:
        return '<p class="absent">This run saved no config.yaml.</p>'
    return (
        "<section><h2>Configuration</h2><details><summary>All settings of the run</summary>"
        f"<pre>{escape(run.config)}</pre></details></section>"
    )


def _has(record: Record, name: str) -> bool:
    return math.isfinite(record.values.get(name, math.nan))


def _when(record: Record) -> str:
    return "before training" if record.iteration == 0 else f"iteration {record.iteration}"


def _headline_number(value: float, share: bool) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{100 * value:.1f} %" if share else f"{value:,.1f}"


def _number(value: float, unit: Unit) -> str:
    if unit == "s":
        return f"{value:,.1f} s"
    if unit == "share":
        return f"{100 * value:.1f} %" if value == 0 or abs(value) >= 0.001 else f"{100 * value:.2g} %"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{4 if abs(value) >= 0.1 else 3}g}".replace("-", "−")


def _minutes(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
