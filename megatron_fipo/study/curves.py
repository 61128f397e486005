"""The figures of a study's page: every run as a thin line, and for each arm the mean over its seeds with its interval."""

import math
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from html import escape
from typing import get_args

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from megatron_fipo.report.chart import drawing, finish_axes, ink
from megatron_fipo.report.page import html_figure, key
from megatron_fipo.report.panel import Color, Line, Panel, Unit
from megatron_fipo.study.compare import Variant
from megatron_fipo.study.results import ACCURACY, LENGTH, Points, Result
from megatron_fipo.study.statistics import bands

COLORS: tuple[Color, ...] = get_args(Color)
THIN, THICK = 0.7, 1.9
LARGEST_BAND = 0.6
"""Of the height of the lines: how far a band may extend the axis on each side. With two or three seeds bands are wide."""


@dataclass(frozen=True)
class Style:
    """How a variant is drawn in all figures."""

    color: Color
    dashed: bool


@dataclass(frozen=True)
class _Mean:
    """Of a variant, at the iterations that all its runs have."""

    iterations: list[int]
    mean: np.ndarray
    low: np.ndarray | None
    high: np.ndarray | None


def _panel(
    metric: str,
    title: str,
    caption: str,
    *,
    unit: Unit = "number",
    reference: float | None = None,
    from_zero: bool = False,
) -> Panel:
    return Panel(title, caption, (Line(metric, title),), None, unit, reference, False, from_zero)


PANELS = (
    _panel(ACCURACY.metric, "Held-out accuracy, avg@k", "The mean over held-out problems.", unit="share"),
    _panel(LENGTH.metric, "Held-out response length", "Mean tokens per response.", from_zero=True),
    _panel(
        "accuracy/mean", "Training accuracy", "Of the responses trained on, after filtering.", unit="share"
    ),
    _panel("policy/entropy", "Entropy", "Nats per token."),
    _panel("policy/kl", "Policy KL", "Mean of log π_old − log π over the mini-steps.", reference=0.0),
    _panel("policy/grad_norm", "Gradient norm", "Before clipping, mean over mini-steps."),
    _panel("influence/mean", "Influence weight, mean", "1 for objectives without weights.", reference=1.0),
    _panel(
        "influence/share_at_low",
        "Weights at the lower bound",
        "Share of tokens whose exp F reaches it; objectives without weights do not use it.",
        unit="share",
        from_zero=True,
    ),
    _panel(
        "influence/share_at_high",
        "Weights at the upper bound",
        "Share of tokens whose exp F reaches it; objectives without weights do not use it.",
        unit="share",
        from_zero=True,
    ),
    _panel("policy/sigma_log_ratio", "σ of the log-ratio, first mini-step", "Healthy is 0.", from_zero=True),
)
"""Figures over iterations; one without data is left out."""


def styles(variants: Sequence[Variant]) -> list[Style]:
    """A style for each variant: colors first, then the same colors dashed."""
    return [Style(COLORS[i % len(COLORS)], i // len(COLORS) % 2 == 1) for i in range(len(variants))]


def figures(variants: Sequence[Variant], looks: Sequence[Style]) -> str:
    """All figures as HTML; variants without runs that count are not drawn."""
    drawn = [_over_iterations(panel, variants, looks) for panel in PANELS]
    return "".join(filter(None, [drawn[0], drawn[1], _accuracy_over_length(variants, looks), *drawn[2:]]))


def _over_iterations(panel: Panel, variants: Sequence[Variant], looks: Sequence[Style]) -> str | None:
    metric = panel.lines[0].metric
    lines = [[_finite(result, metric) for result in variant.results] for variant in variants]
    known = {f"{i}/{j}": line for i, of in enumerate(lines) for j, line in enumerate(of) if line}
    if not known:
        return None
    means = [_mean(of_variant) for of_variant in lines]

    def paint(axes: Axes) -> None:
        if panel.reference is not None:
            axes.axhline(panel.reference, color=ink("grey"), linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
        for of_variant, mean, look in zip(lines, means, looks, strict=True):
            _draw(axes, of_variant, mean, look)
        finish_axes(axes, panel, known, max(max(line) for line in known.values()))
        _limit_height(axes, list(known.values()), means, panel.unit == "share")

    keys = [
        _key(variant, look, mean, panel.unit)
        for variant, look, mean in zip(variants, looks, means, strict=True)
        if mean is not None
    ]
    return html_figure(panel.title, keys, drawing(panel.title, paint), panel.caption)


def _draw(axes: Axes, lines: Sequence[Points], mean: _Mean | None, look: Style) -> None:
    color, dashes = ink(look.color), (0, (3, 2)) if look.dashed else "-"
    for line in lines:
        axes.plot(
            list(line),
            list(line.values()),
            color=color,
            linewidth=THIN,
            alpha=0.4,
            marker=_marker(line),
            zorder=2,
        )
    if mean is None:
        return
    if mean.low is not None and mean.high is not None:
        axes.fill_between(mean.iterations, mean.low, mean.high, color=color, alpha=0.14, linewidth=0)
    axes.plot(
        mean.iterations,
        mean.mean,
        color=color,
        linewidth=THICK,
        linestyle=dashes,
        marker=_marker(mean.iterations),
        zorder=3,
    )


def _marker(points: Sized) -> str:
    """A line of one point has no length."""
    return "o" if len(points) == 1 else ""


def _limit_height(axes: Axes, lines: Sequence[Points], means: Sequence[_Mean | None], share: bool) -> None:
    """Let bands extend a linear axis only so far beyond the lines, and shares stay between 0 and 1."""
    if axes.get_yscale() == "log":
        return
    values = [value for line in lines for value in line.values()]
    low, high = min(values), max(values)
    reach = LARGEST_BAND * (high - low)
    for mean in means:
        if mean is not None and mean.low is not None and mean.high is not None:
            low = min(low, max(float(mean.low.min()), min(values) - reach))
            high = max(high, min(float(mean.high.max()), max(values) + reach))
    bottom, top = axes.get_ylim()
    margin = 0.04 * (high - low)
    bottom, top = max(bottom, low - margin), min(top, high + margin)
    if share:
        bottom, top = max(bottom, 0.0), min(top, 1.0)
    if bottom < top:
        axes.set_ylim(bottom, top)


def _accuracy_over_length(variants: Sequence[Variant], looks: Sequence[Style]) -> str | None:
    """Each evaluation as a point: whether accuracy was gained by longer responses."""
    paths = [[_path(result) for result in variant.results] for variant in variants]
    if not any(path for of_variant in paths for path in of_variant):
        return None
    title = "Accuracy over length"

    def paint(axes: Axes) -> None:
        for of_variant, look in zip(paths, looks, strict=True):
            color = ink(look.color)
            for path in of_variant:
                axes.plot(*_columns(path), color=color, linewidth=THIN, alpha=0.4, zorder=2)
            mean = _mean_path(of_variant)
            if mean:
                dashes = (0, (3, 2)) if look.dashed else "-"
                axes.plot(
                    *_columns(mean), color=color, linewidth=THICK, linestyle=dashes, marker="o", zorder=3
                )
                axes.plot(*_columns(mean[-1:]), color=color, marker="o", markersize=7, zorder=4)
        axes.set_xlabel("held-out response length, tokens")
        axes.xaxis.set_major_locator(MaxNLocator(7))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.yaxis.set_major_locator(MaxNLocator(5))

    keys = [
        _entry(variant, look)
        for variant, look, of_variant in zip(variants, looks, paths, strict=True)
        if any(of_variant)
    ]
    caption = "Held-out avg@k against response length at each evaluation; the large point is the last one."
    return html_figure(title, keys, drawing(title, paint), caption)


def _path(result: Result) -> list[tuple[int, float, float]]:
    """Iteration, length and accuracy of each evaluation."""
    accuracy, length = result.series(ACCURACY), result.series(LENGTH)
    return [
        (iteration, length[iteration], accuracy[iteration]) for iteration in accuracy if iteration in length
    ]


def _mean_path(paths: Sequence[list[tuple[int, float, float]]]) -> list[tuple[int, float, float]]:
    """The mean at the iterations that all runs have."""
    points: dict[int, list[tuple[float, float]]] = {}
    for path in paths:
        for iteration, length, accuracy in path:
            points.setdefault(iteration, []).append((length, accuracy))
    return [
        (iteration, *(float(value) for value in np.mean(found, axis=0)))  # type: ignore[misc]
        for iteration, found in sorted(points.items())
        if len(found) == len(paths)
    ]


def _columns(path: Sequence[tuple[int, float, float]]) -> tuple[list[float], list[float]]:
    return [length for _, length, _ in path], [accuracy for _, _, accuracy in path]


def _finite(result: Result, metric: str) -> Points:
    series: Mapping[int, float] = {} if result.run is None else result.run.series(metric)
    return {iteration: value for iteration, value in series.items() if math.isfinite(value)}


def _mean(lines: Sequence[Points]) -> _Mean | None:
    common = sorted(set.intersection(*(set(line) for line in lines))) if lines else []
    if not common:
        return None
    values = np.array([[line[iteration] for iteration in common] for line in lines])
    return _Mean(common, *bands(values))


def _key(variant: Variant, look: Style, mean: _Mean, unit: Unit) -> str:
    last = float(mean.mean[-1])
    text = f"{100 * last:.1f} %" if unit == "share" else f"{last:.4g}".replace("-", "−")
    return _entry(variant, look, f" <b>{text}</b>")


def _entry(variant: Variant, look: Style, value: str = "") -> str:
    return key("dashes" if look.dashed else "line", look.color, f"{escape(variant.label)}{value}")
