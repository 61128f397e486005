"""Print the preflight: a table of the nodes, then a sentence for each warning and each fault."""

import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_fipo.node.preflight.facts import Fault, Measurements, NetworkFacts, NodeFacts
from megatron_fipo.node.preflight.judge_network import pair_speeds
from megatron_fipo.node.preflight.judge_others import card_warnings

COLUMNS = (
    "node",
    "GPUs",
    "product\nTFLOP/s",
    "/tmp\nGiB",
    "/dev/shm\nGiB",
    "open\nfiles",
    "clock\nms",
    "pairs\nGB/s",
    "shared\nfolder",
    "verdict",
)
UNKNOWN = "-"
LOG_WIDTH = 120
"""Columns of the table if the output is not a terminal."""


def output_console() -> Console:
    """Standard output."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else LOG_WIDTH)


def print_preflight(found: Measurements, faults: Sequence[Fault], console: Console) -> None:
    """Print what the head knows."""
    bad = {name for fault in faults for name in fault.nodes}
    table = Table(box=box.SIMPLE_HEAD)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("node", "verdict") else "right")
    for name in found.names:
        verdict = "fault" if name in bad else "ok"
        table.add_row(*row(name, found), verdict, style="bold red" if name in bad else None)
    console.print(table)
    reduced = [facts.all_reduce_gb_per_s for facts in found.network.values() if facts.all_reduce_gb_per_s]
    if reduced:
        console.print(f"All-reduce over all nodes: {min(reduced):.3g} GB/s of bus bandwidth.")
    for warning in card_warnings(found):
        console.print(f"[yellow]warning[/] {escape(warning)}.", soft_wrap=True)
    for fault in faults:
        console.print(f"[bold red]fault[/] {escape(fault.sentence)}.", soft_wrap=True)
    count = f"{len(found.names)} node{'s' * (len(found.names) > 1)}"
    console.print(f"{count}, {len(faults) or 'no'} fault{'s' * (len(faults) != 1)}, {found.seconds:.1f} s.")


def row(name: str, found: Measurements) -> tuple[str, ...]:
    """The cells of a node, without its verdict."""
    facts, network = found.nodes.get(name, NodeFacts()), found.network.get(name, NetworkFacts())
    head = found.network.get(found.head, NetworkFacts())
    clocks = {clock.node: clock for clock in head.clocks}
    speeds = [speed.gb_per_s for pair, speed in pair_speeds(found).items() if name in pair]
    speed = (
        f"{min(speeds):.3g} to {max(speeds):.3g}" if len(speeds) > 1 else "".join(f"{s:.3g}" for s in speeds)
    )
    space = {item.path: f"{item.free_gib:,.1f}" for item in facts.space or ()}
    slowest = min((product.tflop_per_s for product in facts.products or ()), default=None)
    shared = UNKNOWN if name not in found.canary else "yes" if found.canary[name] is None else "no"
    return (
        name,
        str(len(facts.gpus.by_torch)) if facts.gpus else UNKNOWN,
        UNKNOWN if slowest is None else f"{slowest:.3g}",
        space.get("/tmp", UNKNOWN),
        space.get("/dev/shm", UNKNOWN),
        UNKNOWN if facts.limits is None else f"{facts.limits.open_files or 'unlimited'}",
        f"{clocks[name].seconds * 1e3:+.1f}" if name in clocks else UNKNOWN,
        speed if network.links else UNKNOWN,
        shared,
    )
