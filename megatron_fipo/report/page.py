"""The report as one HTML page without scripts or external files, for light and dark screens and for print."""

import math
from datetime import UTC, datetime
from html import escape

from megatron_fipo.report.chart import draw, panel_series
from megatron_fipo.report.figures import SECTIONS
from megatron_fipo.report.panel import Panel, Section, Unit
from megatron_fipo.report.run_data import Run
from megatron_fipo.report.samples import render_samples
from megatron_fipo.report.style import STYLE
from megatron_fipo.run_dir.metrics_log import Record

# title, metric, whether it is a share
_HEADLINE = (
    ("Accuracy, avg@{k}", "evaluation/avg_at_k", True),
    ("Accuracy, cons@{k}", "evaluation/cons_at_k", True),
    ("Accuracy, pass@{k}", "evaluation/pass_at_k", True),
    ("Response length, mean", "evaluation/length_mean", False),
    ("Response length, median", "evaluation/length_median", False),
    ("Truncated", "evaluation/truncated", True),
)


def render_page(run: Run) -> str:
    """The complete HTML page."""
    body = "".join(
        (
            _header(run),
            _headline(run),
            *(_section(section, run) for section in SECTIONS),
            f"<section><h2>Responses, token by token</h2>{render_samples(run.samples)}</section>",
            _configuration(run),
        )
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(run.name)} · Megatron-FIPO</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def _header(run: Run) -> str:
    objective, model = run.setting("objective.name"), run.setting("model.path")
    times = [record.time for record in run.records]
    start = datetime.fromtimestamp(min(times), UTC)
    facts = [
        f"{run.iterations:,} iterations",
        f"{start:%Y-%m-%d %H:%M} UTC",
        _minutes(max(times) - min(times)),
    ]
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
    k = f"{after.values['evaluation/k']:.0f}" if _has(after, "evaluation/k") else "k"
    rows = "".join(
        _headline_row(title.format(k=k), before, after, name, share)
        for title, name, share in _HEADLINE
        if _has(before, name) or _has(after, name)
    )
    problems = (
        f"{after.values['evaluation/problems']:,.0f} problems"
        if _has(after, "evaluation/problems")
        else "the problems"
    )
    once = before is after
    heads = (
        f"<th>iteration {after.iteration}</th>"
        if once
        else f"<th>{_when(before)}</th><th>{_when(after)}</th><th>change</th>"
    )
    return (
        f'<section class="headline"><h2>Held-out problems{"" if once else ", before and after"}</h2>'
        '<div class="scroll">'
        f"<table><thead><tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
        f"<p>Measured on {problems} that were not trained on, with {k} responses each. avg@{k} is the mean "
        f"accuracy of a response, cons@{k} the accuracy of the answer given by most responses, pass@{k} the "
        "share of problems that at least one response solves.</p></section>"
    )


def _headline_row(title: str, before: Record, after: Record, name: str, share: bool) -> str:
    old, new = before.values.get(name, math.nan), after.values.get(name, math.nan)
    if before is after:
        return f"<tr><th>{title}</th><td><b>{_headline_number(new, share)}</b></td></tr>"
    change = (
        "–"
        if math.isnan(new - old)
        else (f"{100 * (new - old):+.1f} points" if share else f"{new - old:+,.1f} tokens")
    )
    cells = (
        f"<td>{_headline_number(old, share)}</td><td><b>{_headline_number(new, share)}</b></td>"
        f"<td>{change.replace('-', '−')}</td>"
    )
    return f"<tr><th>{title}</th>{cells}</tr>"


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
            keys.append(_key(mark, line.color, f"{escape(line.label)} <b>{_number(last, panel.unit)}</b>"))
            notes.append(line.note)
    if panel.band and panel.band.low in series and panel.band.high in series:
        keys.append(_key("band", panel.band.color, escape(panel.band.label)))
    unit = "" if panel.unit in ("number", "share") else f", {panel.unit}"
    caption = " ".join(filter(None, (panel.caption, *notes)))
    return (
        f'<figure><h3>{escape(panel.title)}{unit}</h3><p class="keys">{"".join(keys)}</p>{svg}'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _key(mark: str, color: str, label: str) -> str:
    return f'<span><i class="{mark}" style="--c:var(--{color})"></i>{label}</span>'


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
