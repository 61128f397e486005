"""The ports of Ray on a node: a block below the ephemeral range, which depends on the job and is free on the node.

Ports of the ephemeral range can be taken by any outgoing connection at any time. Each job starts with another block, so two
jobs on one node rarely try the same; the first port of a block stays bound as long as Ray runs, so they never use the same.
"""

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from megatron_fipo.errors import UserError

EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
BLOCK = 1024
"""Ports of one block. Each process of Ray on the node takes one."""
FIRST_UNPRIVILEGED = 1024
USUAL_FIRST = 10240
"""Blocks start here if at least one fits below the ephemeral range: services have lower ports."""
SERVERS = (
    "gcs",
    "node_manager",
    "object_manager",
    "runtime_env_agent",
    "agent_http",
    "agent_grpc",
    "metrics",
    "client",
    "autoscaler_metrics",
    "dashboard_metrics",
)


@dataclass(frozen=True)
class Ports:
    """A block. The first port is the claim to it, the next are those of servers, all others those of workers."""

    first: int

    @property
    def claim(self) -> int:
        return self.first

    def server(self, name: str) -> int:
        """The port of one of `SERVERS`."""
        return self.first + 1 + SERVERS.index(name)

    @property
    def workers(self) -> range:
        return range(self.first + 1 + len(SERVERS), self.first + BLOCK)

    def __str__(self) -> str:
        servers = ", ".join(f"{name} {self.server(name)}" for name in SERVERS)
        return f"claim {self.claim}, {servers}, workers {self.workers[0]}-{self.workers[-1]}"


def ephemeral_floor(source: Path = EPHEMERAL_RANGE) -> int:
    """The lowest port that the kernel gives to outgoing connections."""
    return int(source.read_text().split()[0])


def blocks(job: int, floor: int) -> Iterator[Ports]:
    """All blocks below `floor`, in the order in which job number `job` tries them."""
    first = USUAL_FIRST if floor >= USUAL_FIRST + BLOCK else FIRST_UNPRIVILEGED
    count = (floor - first) // BLOCK
    for index in range(count):
        yield Ports(first + (job + index) % count * BLOCK)


def claim(address: str, job: int, floor: int) -> tuple[Ports, socket.socket]:
    """The first block whose ports are all free at `address`, and the socket that keeps it from other jobs until it closes.

    Raises UserError if there is none.
    """
    for ports in blocks(job, floor):
        holder = _bind(address, ports.claim)
        if holder is None:
            continue
        holder.listen()
        if _all_free(address, range(ports.claim + 1, ports.first + BLOCK)):
            return ports, holder
        holder.close()
    raise UserError(
        f"{socket.gethostname()} has no {BLOCK:,} free ports in a row between {FIRST_UNPRIVILEGED} and {floor}; end what "
        f"uses them, or raise the lower end of {EPHEMERAL_RANGE}"
    )


def _all_free(address: str, ports: range) -> bool:
    with ExitStack() as stack:
        return all(
            bound is not None and stack.enter_context(bound)
            for bound in (_bind(address, port) for port in ports)
        )


def _bind(address: str, port: int) -> socket.socket | None:
    """A socket with the port on all addresses of the node, as some of Ray's servers use it; None if it is taken."""
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        bound.bind((address, port))
    except OSError:
        bound.close()
        return None
    return bound
