"""Console output of a run.

On a terminal: two permanent rows per iteration (what it learned, what it cost), and below them a live line with the current
phase, a progress bar and the time left. Elsewhere (a pipe, a log file): the same rows as plain lines without control characters.
"""

import math
import sys
import time
from collections import deque
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TextIO

from rich.console import Console as RichConsole
from rich.console import ConsoleRenderable, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from megatron_fipo.phases import PHASES
from megatron_fipo.run_dir.evaluation_names import evaluation_metric, sets_in

# column title, metric name, format
_COLUMNS = (
    ("reward", "reward/mean", "{:+.3f}"),
    ("accuracy", "accuracy/mean", "{:.3f}"),
    ("length", "length/mean", "{:>5.0f} tokens"),
    ("influence", "influence/mean", "{:.4f}"),
)
_SUMMARY_ROWS = (
    ("avg@k", "avg_at_k", "{:.3f}"),
    ("cons@k", "cons_at_k", "{:.3f}"),
    ("pass@k", "pass_at_k", "{:.3f}"),
    ("response length, mean", "length_mean", "{:.1f}"),
    ("response length, median", "length_median", "{:.1f}"),
    ("truncated", "truncated", "{:.1%}"),
)
"""Label, metric of an evaluation set, format."""
_RATES = (
    ("iteration", "throughput/tokens_per_s_per_gpu"),
    ("engines", "throughput/rollout_tokens_per_s_per_gpu"),
    ("trainer", "throughput/train_tokens_per_s_per_gpu"),
)
"""Label and metric, in tokens/s per GPU."""
_LARGE_PHASE = 0.05
"""Share of an iteration from which a phase is named in its row."""
_REST = "rest"
"""Label of all phases that are not named."""
_ABSENT = "-"
FIRST_PROGRESS_S = 60.0
"""Seconds in a phase after which a console without a terminal prints its progress for the first time."""
_RECENT_ITERATIONS = 10
"""Iterations whose mean duration predicts the time left: responses grow, so older ones predict less."""


class Console:
    """The console of a run, used as a context manager. Methods may also be called outside of it, without the live line."""

    def __init__(self, total_iterations: int, file: TextIO | None = None) -> None:
        file = file or sys.stdout
        self._terminal = file.isatty()
        self._rich = RichConsole(file=file, force_terminal=self._terminal, highlight=False)
        self._live: Live | None = None
        self._spinner = Spinner("dots")
        self._total = total_iterations
        self._iteration = 0
        self._phase = "starting"
        self._detail = ""
        self._phase_start = time.monotonic()
        self._progress_after = FIRST_PROGRESS_S
        self._last_iteration_end: float | None = None
        self._durations: deque[float] = deque(maxlen=_RECENT_ITERATIONS)

    def __enter__(self) -> "Console":
        if self._terminal:
            self._live = Live(
                get_renderable=self._render, console=self._rich, refresh_per_second=4, transient=True
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_live()

    def phase(self, name: str, detail: str = "") -> None:
        """Set the current phase; shown on a terminal only. The first rollout starts the clock of the time left."""
        if name != self._phase:
            self._phase_start = time.monotonic()
            self._progress_after = FIRST_PROGRESS_S
        self._phase, self._detail = name, detail
        if self._last_iteration_end is None and name == "rollout":  # earlier phases belong to no iteration
            self._last_iteration_end = time.monotonic()

    def progress(self, detail: str) -> None:
        """How far the current phase is. Elsewhere than on a terminal it is printed after 1, 2, 4, ... minutes."""
        self._detail = detail
        elapsed = time.monotonic() - self._phase_start
        if not self._terminal and elapsed >= self._progress_after:
            self._progress_after *= 2
            self._print(f"{self._phase} for {_duration(elapsed)}: {detail}")

    def iteration(self, iteration: int, values: Mapping[str, float]) -> None:
        """Iteration `iteration` (from 1) ended with `values`, by metric name; missing ones are shown as a dash."""
        now = time.monotonic()
        if self._last_iteration_end is not None:
            self._durations.append(now - self._last_iteration_end)
        self._last_iteration_end = now
        self._iteration = iteration
        cells = "  ".join(
            f"{title} {_cell(values, name, form):>6}" for title, name, form in _COLUMNS if name in values
        )
        width = len(str(self._total))
        left = f"  left {_duration(self.seconds_left)}" if iteration < self._total else ""
        self._print(f"iteration {iteration:>{width}}/{self._total}  {cells}{left}")
        if values.get("time/total", 0.0) > 0:
            self._print(f"    {_cost(values)}", style="dim")

    def evaluation(self, iteration: int, values: Mapping[str, float]) -> None:
        """The weights after `iteration` (0: before training) were evaluated with `values`."""
        rows = _evaluation_rows(values)
        width = max(map(len, rows))
        for title, of_set in rows.items():
            cells = partial(_evaluation_cell, values, of_set)
            scores = "  ".join(
                f"{name}@{cells('k', '{:.0f}')} {cells(f'{name}_at_k', '{:.3f}')}"
                for name in ("avg", "cons", "pass")
            )
            self._print(
                f"held-out {title:{width}} after {iteration}: {scores}  length {cells('length_mean', '{:.1f}')}  "
                f"({_problems(values, of_set)})",
                style="bold cyan",
            )

    def note(self, text: str) -> None:
        """Print a sentence."""
        self._print(text, style="yellow")

    def summary(
        self,
        before: Mapping[str, float] | None,
        after: Mapping[str, float] | None,
        report_path: Path | None,
        model_path: Path | None,
    ) -> None:
        """Print evaluation values before and after the run and the paths of report and model. None if absent."""
        self._stop_live()
        if before is not None or after is not None:
            table = Table(title="Held-out problems", title_justify="left", title_style="bold")
            for heading in ("set", "", "before", "after", "change"):
                table.add_column(heading, justify="left" if heading in ("set", "") else "right")
            for row, of_set in _evaluation_rows({**(before or {}), **(after or {})}).items():
                for title, metric, form in _SUMMARY_ROWS:
                    name = evaluation_metric(metric, of_set)
                    if name in (before or {}) or name in (after or {}):
                        table.add_row(row, title, *_before_after(before or {}, after or {}, name, form))
            self._rich.print(table)
        for title, path in (("report", report_path), ("model", model_path)):
            if path is not None:
                self._print(f"{title:6} {path}", style="bold")

    @property
    def seconds_left(self) -> float | None:
        """Until the last iteration ends: from the mean of the last ones, evaluations included. None before the first has ended."""
        if not self._durations:
            return None
        return sum(self._durations) / len(self._durations) * (self._total - self._iteration)

    def _stop_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, text: str, style: str = "") -> None:
        self._rich.print(Text(text, style=style), soft_wrap=True)
        if not self._terminal:
            self._rich.file.flush()

    def _render(self) -> ConsoleRenderable:
        detail = f"  {self._detail}" if self._detail else ""
        elapsed = _duration(time.monotonic() - self._phase_start)
        self._spinner.update(text=Text.assemble((self._phase, "bold"), detail, (f"  {elapsed}", "dim")))
        progress = Table.grid(padding=(0, 1))
        progress.add_row(
            f"iteration {self._iteration}/{self._total}",
            ProgressBar(total=max(self._total, 1), completed=self._iteration, width=40),
            f"left {_duration(self.seconds_left)}",
        )
        return Group(self._spinner, progress)


def _cost(values: Mapping[str, float]) -> str:
    """Where the time of an iteration went, largest part first, and its rates."""
    total = values["time/total"]
    shares = {phase.label: values.get(f"time/{phase.name}", 0.0) / total for phase in PHASES}
    large = {label: share for label, share in shares.items() if share >= _LARGE_PHASE}
    parts = [*sorted(large.items(), key=lambda part: -part[1]), (_REST, 1 - sum(large.values()))]
    where = ", ".join(f"{label} {share:.0%}" for label, share in parts)
    row = [f"{total:.1f} s: {where}"]
    rates = [f"{title} {_cell(values, name, '{:,.0f}')}" for title, name in _RATES if name in values]
    if rates:
        device = "GPU" if "memory/device_gib" in values else "rank or engine"
        row.append(f"tokens/s per {device}: {', '.join(rates)}")
    if "mfu/update" in values:
        row.append(f"MFU {_cell(values, 'mfu/update', '{:.1%}')}")
    return "  ".join(row)


def _evaluation_rows(values: Mapping[str, float]) -> dict[str, str | None]:
    """Title and set of each row to show of an evaluation. Of several sets the last row is over all of them (None)."""
    names = sets_in(values)
    rows: dict[str, str | None] = {name: name for name in names}
    if len(names) != 1:
        rows[f"mean of {len(names)} sets" if names else "problems"] = None
    return rows


def _evaluation_cell(values: Mapping[str, float], of_set: str | None, name: str, form: str) -> str:
    return _cell(values, evaluation_metric(name, of_set), form)


def _problems(values: Mapping[str, float], of_set: str | None) -> str:
    """How many problems an evaluation is of, and how many it had to exclude."""
    scored = _evaluation_cell(values, of_set, "problems", "{:.0f}")
    failed = values.get(evaluation_metric("failed", of_set), 0.0)
    if not failed:
        return f"{scored} problems"
    total = values[evaluation_metric("problems", of_set)] + failed
    return f"{scored} of {total:.0f} problems; {failed:.0f} could not be scored or sampled"


def _cell(values: Mapping[str, float], name: str, form: str) -> str:
    value = values.get(name, math.nan)
    return form.format(value) if math.isfinite(value) else _ABSENT


def _before_after(
    before: Mapping[str, float], after: Mapping[str, float], name: str, form: str
) -> tuple[str, str, str]:
    change = {name: after.get(name, math.nan) - before.get(name, math.nan)}
    return _cell(before, name, form), _cell(after, name, form), _cell(change, name, form.replace("{:", "{:+"))


def _duration(seconds: float | None) -> str:
    """`45 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds is None:
        return _ABSENT
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
