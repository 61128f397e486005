"""Draw a panel as an inline SVG with the page's colors and typeface.

matplotlib supports fixed colors only. So each color is drawn as a placeholder that no other part of the
drawing uses, and then replaced by a CSS variable: the same SVG is readable on light and dark pages. Text
remains text, in the page's typeface.
"""

import math
import re
from collections.abc import Callable, Mapping
from io import StringIO
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from megatron_fipo.report.panel import Color, Panel
from megatron_fipo.report.run_data import Run

_PLACEHOLDERS = {
    "ink": "#010101",
    "faint": "#010102",
    "blue": "#010103",
    "orange": "#010104",
    "teal": "#010105",
    "magenta": "#010106",
    "grey": "#010107",
    "brown": "#010108",
    "violet": "#010109",
    "sky": "#01010a",
    "green": "#01010b",
    "red": "#01010c",
    "gold": "#01010d",
}
_SIZE_INCHES = (4.7, 2.35)
_MARKED_POINTS = 30
"""Series of at most this many points have markers, so that single values and gaps are visible."""
_BARS = 60
"""A stacked panel of at most this many iterations has bars, a longer one areas."""
_LOG_SPAN = 100.0
"""Positive values that span more than this factor get a logarithmic axis."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.size": 10.0,
    "axes.edgecolor": _PLACEHOLDERS["faint"],
    "axes.labelcolor": _PLACEHOLDERS["ink"],
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _PLACEHOLDERS["faint"],
    "grid.linewidth": 0.6,
    "xtick.color": _PLACEHOLDERS["faint"],
    "xtick.labelcolor": _PLACEHOLDERS["ink"],
    "ytick.color": _PLACEHOLDERS["faint"],
    "ytick.labelcolor": _PLACEHOLDERS["ink"],
    "ytick.major.size": 0.0,
    "lines.markersize": 3.0,
}


def panel_series(panel: Panel, run: Run) -> dict[str, dict[int, float]]:
    """Metric → series, for the panel's metrics that have a finite value in this run."""
    series = {name: run.series(name) for name in panel.metrics}
    return {
        name: values
        for name, values in series.items()
        if any(math.isfinite(value) for value in values.values())
    }


def draw(panel: Panel, run: Run) -> str | None:
    """The panel as an `<svg>` element; None if the run has no data for it."""
    series = panel_series(panel, run)
    if not series:
        return None

    def paint(axes: Axes) -> None:
        if panel.stacked:
            _draw_stack(axes, panel, series)
        else:
            _draw_lines(axes, panel, series)
        finish_axes(axes, panel, series, run.iterations)

    return drawing(panel.title, paint)


def drawing(title: str, paint: Callable[[Axes], None], size: tuple[float, float] = _SIZE_INCHES) -> str:
    """What `paint` draws, as an `<svg>` element in the page's style; `size` in inches. Its colors are those of `ink`."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure.add_subplot())
        buffer = StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _themed(buffer.getvalue(), title)


def ink(name: Literal["ink", "faint"] | Color) -> str:
    """A color of the page, as matplotlib takes it."""
    return _PLACEHOLDERS[name]


def _draw_lines(axes: Axes, panel: Panel, series: Mapping[str, Mapping[int, float]]) -> None:
    band = panel.band
    if band and band.low in series and band.high in series:
        low, high = series[band.low], series[band.high]
        both = [iteration for iteration in low if iteration in high]
        axes.fill_between(
            both,
            [low[i] for i in both],
            [high[i] for i in both],
            color=_PLACEHOLDERS[band.color],
            alpha=0.18,
            linewidth=0,
        )
    if panel.reference is not None:
        axes.axhline(
            panel.reference, color=_PLACEHOLDERS["grey"], linewidth=1.0, linestyle=(0, (4, 3)), zorder=1
        )
    for line in panel.lines:
        if line.metric in series:
            values = series[line.metric]
            points = sum(map(math.isfinite, values.values()))
            axes.plot(
                list(values),
                list(values.values()),
                color=_PLACEHOLDERS[line.color],
                linestyle=(0, (2, 2)) if line.dashed else "-",
                marker="o" if points <= _MARKED_POINTS and not line.dashed else None,
                linewidth=1.5 if points <= _BARS else 1.0,
                clip_on=False,  # lines along the edge are shown at full width
                zorder=3,
            )


def _draw_stack(axes: Axes, panel: Panel, series: Mapping[str, Mapping[int, float]]) -> None:
    lines = [line for line in panel.lines if line.metric in series]
    iterations = sorted({iteration for line in lines for iteration in series[line.metric]})
    heights = [[max(_finite(series[line.metric].get(i, 0.0)), 0.0) for i in iterations] for line in lines]
    colors = [_PLACEHOLDERS[line.color] for line in lines]
    if len(iterations) > _BARS:
        axes.stackplot(iterations, heights, colors=colors, linewidth=0)
        return
    bottom = [0.0] * len(iterations)
    for layer, color in zip(heights, colors, strict=True):
        axes.bar(iterations, layer, bottom=bottom, color=color, width=0.82, linewidth=0)
        bottom = [low + value for low, value in zip(bottom, layer, strict=True)]


def finish_axes(axes: Axes, panel: Panel, series: Mapping[str, Mapping[int, float]], iterations: int) -> None:
    """Scale and labels of the axes for these series of a panel, over so many iterations."""
    values = [value for one in series.values() for value in one.values() if math.isfinite(value)]
    share = panel.unit == "share"
    if not panel.stacked and not share and min(values) > 0 and max(values) > _LOG_SPAN * min(values):
        axes.set_yscale("log")
    elif share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.yaxis.set_major_locator(MaxNLocator(5))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=all(value == round(value) for value in values)))
        if max(values) >= 10_000:
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        else:
            axes.ticklabel_format(axis="y", useOffset=False, scilimits=(-4, 5))
    if (panel.from_zero or panel.stacked) and axes.get_yscale() != "log":
        axes.set_ylim(bottom=0.0, top=None if max(values) > 0 else 1.0)
    last = max(iterations, 1)
    left, right = (0.4, 0.6) if panel.stacked else (0.0, 0.0)  # half a bar
    axes.set_xlim(left - 0.02 * last, right + 1.02 * last)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.set_xlabel("iteration")


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _themed(svg: str, title: str) -> str:
    """Only the `<svg>` element: colors as CSS variables, the page's typeface, no ids shared by figures."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    for name, placeholder in _PLACEHOLDERS.items():
        svg = svg.replace(placeholder, f"var(--{name})")
    return re.sub(r"<svg ", f'<svg role="img" aria-label="{title}" ', svg, count=1)
