"""The figures of the page: one iteration as a Gantt chart, and curves."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from megatron_fipo.report.chart import drawing, ink
from megatron_fipo.report.page import html_figure, key
from megatron_fipo.report.panel import Color
from megatron_fipo.simulate.iteration import SCORE, SYNC, UPDATE, Iteration
from megatron_fipo.simulate.pool import Load

ROWS = 32
"""Engines up to which each has a row."""
BINS = 240
"""Parts of an iteration whose mean load is drawn."""
LEVELS = 8
"""Shades of an engine's load."""
PHASES: dict[str, Color] = {SCORE: "teal", UPDATE: "blue", SYNC: "magenta"}


@dataclass(frozen=True)
class Curve:
    """One line of a figure."""

    label: str
    values: Sequence[float]
    color: Color = "blue"


def engine_loads(iteration: Iteration, engines: int) -> np.ndarray:
    """[engines, BINS] mean running sequences of each engine in equal parts of the iteration."""
    edges = np.linspace(iteration.start, iteration.end, BINS + 1)
    by_engine: list[list[Load]] = [[] for _ in range(engines)]
    for load in iteration.usage.loads:
        by_engine[load.engine].append(load)
    return np.array([_mean_between(edges, loads) for loads in by_engine])


def _mean_between(edges: np.ndarray, loads: Sequence[Load]) -> np.ndarray:
    """[len(edges) − 1] means of a step function that is 0 before the first load: differences of its integral."""
    if not loads:
        return np.zeros(len(edges) - 1)
    times = np.array([load.at for load in loads])
    running = np.array([load.running for load in loads], dtype=float)
    area = np.concatenate([[0.0], np.cumsum(running[:-1] * np.diff(times))])
    last = np.clip(np.searchsorted(times, edges, side="right") - 1, 0, None)
    integral = area[last] + running[last] * np.maximum(edges - times[last], 0.0)
    return np.diff(integral) / np.diff(edges)


def gantt(iteration: Iteration, engines: int, capacity: float) -> str:
    """One iteration: the trainer's phases in the first row, the engines below; more than `ROWS` as their sum.

    `capacity`: sequences that make an engine's row fully dark.
    """
    loads = engine_loads(iteration, engines)
    apart = engines <= ROWS
    unit, name = (60.0, "minutes") if iteration.seconds > 600 else (1.0, "seconds")
    at = (np.linspace(0, iteration.seconds, BINS + 1)) / unit

    def paint(axes: Axes) -> None:
        rows = engines if apart else 10
        for phase in iteration.phases:
            start, length = (phase.start - iteration.start) / unit, (phase.end - phase.start) / unit
            axes.broken_barh([(start, length)], (-2.2, 1.7), facecolors=ink(PHASES[phase.name]), linewidth=0)
        if apart:
            for number in range(engines):
                _paint_row(axes, at, np.ceil(loads[number] / capacity * LEVELS), number)
        else:
            total = loads.sum(axis=0)
            heights = rows - total / max(total.max(), 1.0) * (rows - 0.5)
            axes.fill_between(
                at, np.append(heights, heights[-1]), rows, step="post", color=ink("orange"), linewidth=0
            )
        axes.set_ylim(rows + 0.2, -2.6)
        axes.set_xlim(0, at[-1])
        axes.grid(False)
        step = max(1, engines // 8)
        numbers = range(0, engines, step) if apart else ()
        axes.set_yticks([-1.35, *(number + 0.5 for number in numbers)])
        axes.set_yticklabels(["trainer", *(f"engine {number}" for number in numbers)])
        if not apart:
            axes.set_yticks([-1.35, 0.5, rows])
            axes.set_yticklabels(["trainer", f"{loads.sum(axis=0).max():,.0f}", "0"])
        axes.set_xlabel(name)

    keys = [key("area", color, phase) for phase, color in PHASES.items()]
    keys.append(key("area", "orange", "sequences at engines"))
    rows = (
        f"each row is an engine; the darkest shade is {capacity:,.0f} running sequences"
        if apart
        else f"below, the sequences that run on all {engines:,} engines together"
    )
    caption = f"The last iteration that was simulated. The first row is the trainer, which waits where it is empty; {rows}."
    svg = drawing("One iteration", paint, (11.6, 1.6 + 0.13 * (engines if apart else 12)))
    return html_figure("One iteration", keys, svg, caption)


def _paint_row(axes: Axes, at: np.ndarray, levels: np.ndarray, row: int) -> None:
    """Runs of bins with one level, as one rectangle each."""
    start = 0
    for level, run in groupby(np.minimum(levels, LEVELS)):
        length = len(list(run))
        if level:
            bar = [(at[start], at[start + length] - at[start])]
            axes.broken_barh(
                bar, (row + 0.06, 0.88), facecolors=ink("orange"), alpha=level / LEVELS, linewidth=0
            )
        start += length


def curves(
    title: str,
    caption: str,
    x: Sequence[float],
    lines: Sequence[Curve],
    *,
    x_label: str,
    share: bool = False,
    log: bool = False,
    marked: float | None = None,
) -> str:
    """A figure with lines over `x`. `share`: values are fractions. `log`: both axes are logarithmic. `marked`: an x to mark.

    The legend shows the values at the mark, or the last ones.
    """

    def paint(axes: Axes) -> None:
        for line in lines:
            axes.plot(
                x, line.values, color=ink(line.color), marker="o", linewidth=1.5, clip_on=False, zorder=3
            )
        if marked is not None:
            axes.axvline(marked, color=ink("grey"), linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
        if log:
            axes.set_xscale("log", base=2)
            axes.set_xticks(x, [f"{value:,.0f}" for value in x])
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        if share:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            axes.set_ylim(0.0, 1.0)
        elif log and min(min(line.values) for line in lines) > 0:
            ticks = _powers_of_two([value for line in lines for value in line.values])
            axes.set_yscale("log", base=2)
            axes.set_ylim(ticks[0], ticks[-1])
            axes.set_yticks(ticks, [f"{tick:,.4g}" for tick in ticks])
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_ylim(bottom=0.0)
            axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(x_label)

    shown = x.index(marked) if marked in x else -1
    keys = [
        key("line", line.color, f"{line.label} <b>{_text(line.values[shown], share)}</b>") for line in lines
    ]
    return html_figure(title, keys, drawing(title, paint), caption)


def _powers_of_two(values: Sequence[float]) -> list[float]:
    """From the last below the values to the first above them."""
    low, high = math.floor(math.log2(min(values))), math.ceil(math.log2(max(values)))
    return [2.0**power for power in range(low, max(high, low + 1) + 1)]


def _text(value: float, share: bool) -> str:
    return f"{value:.0%}" if share else f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.3g}"
