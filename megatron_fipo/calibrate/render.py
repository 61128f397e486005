"""Print the figures of a calibrated machine, and what was not measured."""

from collections.abc import Iterator
from dataclasses import fields

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_fipo.calibrate.machine import Calibration
from megatron_fipo.plan.machine import Figure, Link, Machine

PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"))
UNITS = {
    "products": "FLOP/s",
    "attention_forward": "FLOP/s",
    "attention_backward": "FLOP/s",
    "prefill": "FLOP/s",
    "layer_host": "s",
    "decode_step": "s",
    "decode_sequence": "s",
    "latency": "s",
    "reserved_bytes": "B",
    "fragmentation": "",
}
"""Of figures by the first or last part of their name; others are bytes per second."""


def print_calibration(found: Calibration, console: Console) -> None:
    """A line for each figure, and one for each reason of those that are not measured."""
    machine = found.machine
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("figure", "value", "from", "to", "measured"):
        left = column in ("figure", "measured")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for name, figure in figures(machine):
        numbers = (quantity(number, name) for number in (figure.value, figure.low, figure.high))
        table.add_row(name, *numbers, "here" if figure.calibrated else "no")
    console.print(f"{escape(machine.name)}: {machine.devices_per_node} x {escape(machine.device)}")
    console.print(table)
    by_reason: dict[str, list[str]] = {}
    for name, reason in found.reasons.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        console.print(f"Not measured: {', '.join(names)}: {escape(reason)}.", soft_wrap=True)


def figures(machine: Machine) -> Iterator[tuple[str, Figure]]:
    """All figures by their dotted names."""
    for precision, products in machine.products.items():
        yield f"products.{precision}", products.rate
    for item in fields(machine):
        value = getattr(machine, item.name)
        if isinstance(value, Figure):
            yield item.name, value
        elif isinstance(value, Link):
            yield f"{item.name}.rate", value.rate
            yield f"{item.name}.latency", value.latency


def quantity(number: float, name: str) -> str:
    """A number with prefix and unit, such as "4.21 TB/s"."""
    first, _, last = name.partition(".")
    unit = UNITS.get(last, UNITS.get(first, "B/s"))
    if not unit:
        return f"{number:.3g}"
    scale, prefix = next((pair for pair in PREFIXES if number >= pair[0]), PREFIXES[-1])
    return f"{number / scale:.3g} {prefix}{unit}"
