"""Tables and numbers of a plan on the console."""

from rich import box
from rich.table import Table
from rich.text import Text

from megatron_fipo.plan.estimate import Estimate

GIB = 2**30
LEFT = ("ranks", "layers", "holds", "part", "phase", "largest part", "layout", "limited by")
"""Columns of text."""


def table(title: str, *columns: str) -> Table:
    """An empty table with these columns; without columns, of names and values."""
    made = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_header=bool(columns),
        min_width=min(len(title) + 2, 78),
    )
    for column in columns:
        made.add_column(column, justify="left" if column in LEFT else "right", no_wrap=True)
    return made


def figure(number: float) -> str:
    """Three significant digits, with thousands separated: 0.0123, 4.56, 78.9, 1,230."""
    if number == 0:
        return "0"
    magnitude = abs(number)
    if magnitude >= 100:
        return f"{number:,.0f}"
    return f"{number:.1f}" if magnitude >= 10 else f"{number:.2f}" if magnitude >= 1 else f"{number:.3g}"


def with_interval(estimate: Estimate, scale: float = 1.0) -> str:
    """For example "78.9 (70.1 to 91.2)"; the interval is left out of an exact number."""
    value, low, high = (number / scale for number in (estimate.value, estimate.low, estimate.high))
    if low == high:
        return figure(value)
    return f"{figure(value)} ({figure(low)} to {figure(high)})"


def duration(estimate: Estimate) -> str:
    """Seconds in the largest unit that keeps the value above 2: seconds, minutes, hours or days."""
    for unit, seconds in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if estimate.value > 2 * seconds:
            return f"{with_interval(estimate, seconds)} {unit}"
    return f"{with_interval(estimate)} s"
