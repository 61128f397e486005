"""Which nodes are checked, and which of them this is: from Slurm's environment or from options."""

import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_fipo.errors import UserError
from megatron_fipo.field_rules import quoted
from megatron_fipo.node.slurm_variables import text, whole_number

FIRST_PORT, PORTS = 20_000, 8_000
"""Below the ephemeral ports of Linux, whose lowest is 32,768 by default."""
LARGEST_PORT = 65_535
MOST_NODES = 100_000
_HEAD = re.compile(r"(?P<host>[^:\s]+)(:(?P<port>[0-9]{1,5}))?")
_GROUP = re.compile(r"(?P<before>[^\[\]]*)\[(?P<numbers>[0-9,\-]+)\](?P<after>.*)")
_SPAN = re.compile(r"(?P<first>[0-9]{1,9})(-(?P<last>[0-9]{1,9}))?")


@dataclass(frozen=True)
class Allocation:
    """The nodes of a job as this node sees them."""

    names: tuple[str, ...]
    """By rank; the first is the head."""
    rank: int
    address: str
    """Host name or address of the head."""
    port: int
    """Of the head's store; 0 chooses a free one, on a single node."""

    @property
    def name(self) -> str:
        """This node."""
        return self.names[self.rank]


def from_slurm(environment: Mapping[str, str], head: str | None = None) -> Allocation:
    """The nodes of this srun, or this machine alone outside Slurm. `head` is HOST[:PORT].

    Raises `UserError` if srun started several tasks on a node.
    """
    if "SLURM_PROCID" not in environment:
        return from_options((socket.gethostname(),), 0, head)
    names = expand_nodes(environment.get("SLURM_STEP_NODELIST") or text(environment, "SLURM_JOB_NODELIST"))
    tasks, rank = whole_number(environment, "SLURM_NTASKS"), whole_number(environment, "SLURM_PROCID")
    if tasks != len(names):
        raise UserError(
            f"srun started {tasks} tasks on {len(names)} nodes; use srun --ntasks-per-node=1 --nodes={len(names)}"
        )
    if rank >= tasks:
        raise UserError(
            f"SLURM_PROCID={rank} is none of {tasks} tasks; Slurm sets it, so do not set it yourself"
        )
    return _allocation(names, rank, head, FIRST_PORT + whole_number(environment, "SLURM_JOB_ID") % PORTS)


def from_options(names: Sequence[str], rank: int, head: str | None) -> Allocation:
    """Nodes that the user names. Raises `UserError` unless rank and head fit them."""
    if not 0 <= rank < len(names):
        raise UserError(f"--rank {rank} must be between 0 and {len(names) - 1}, for {len(names)} nodes")
    return _allocation(tuple(names), rank, head, FIRST_PORT if len(names) > 1 else 0)


def _allocation(names: tuple[str, ...], rank: int, head: str | None, port: int) -> Allocation:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"node {twice} is named twice; run one preflight on each node")
    unusable = next((name for name in names if not name.strip() or name != name.strip()), None)
    if unusable is not None:
        raise UserError(
            f"{quoted(unusable)} is not the name of a node; give names separated by commas, without spaces"
        )
    match = _HEAD.fullmatch(head or names[0])
    if match is None or int(match["port"] or port) > LARGEST_PORT:
        raise UserError(
            f"--head {quoted(head or names[0])} must be HOST or HOST:PORT with a port up to {LARGEST_PORT}"
        )
    if len(names) > 1 and match["port"] and not int(match["port"]):
        raise UserError(
            "--head has port 0, which only a single node can use; give the same port on all nodes"
        )
    return Allocation(names, rank, match["host"], int(match["port"] or port))


def expand_nodes(nodes: str) -> tuple[str, ...]:
    """The names in a Slurm node list such as `gpu[01-03,7],login`.

    A container may lack `scontrol show hostnames`. Raises `UserError` if the list cannot be read.
    """
    names: list[str] = []
    parts = re.findall(r"(?:\[[^\]]*\]|[^,\[])+", nodes)
    try:
        if ",".join(parts) != nodes:
            raise ValueError("a bracket is not closed, or a name is empty")
        for part in parts:
            names += _expand_group(part)
    except ValueError as error:
        raise UserError(
            f"the node list {quoted(nodes)} cannot be read ({error}); name the nodes by --nodes a,b,c and --rank"
        ) from None
    return tuple(names)


def _expand_group(part: str) -> list[str]:
    """Raises ValueError."""
    if not set("[]") & set(part):
        return [part]
    match = _GROUP.fullmatch(part)
    if match is None:
        raise ValueError(f"{part} is not a group")
    numbers: list[str] = []
    for span in match["numbers"].split(","):
        ends = _SPAN.fullmatch(span)
        if ends is None or not 0 <= int(ends["last"] or ends["first"]) - int(ends["first"]) < MOST_NODES:
            raise ValueError(f"{span} is not a range")
        first, last = int(ends["first"]), int(ends["last"] or ends["first"])
        numbers += [str(number).zfill(len(ends["first"])) for number in range(first, last + 1)]
    afters = _expand_group(match["after"])
    return [f"{match['before']}{number}{after}" for number in numbers for after in afters]
