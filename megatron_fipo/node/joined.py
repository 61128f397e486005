"""Waits until exactly the nodes of the job have joined Ray, or finds those that have left it.

    python -m megatron_fipo.node.joined --logs FOLDER --address IP:PORT --timeout SECONDS [--lost] NODE ...

Exits with 0 if all have joined, 2 if a node has another number of GPUs or an error that a user must fix, else with 86 after
adding the missing nodes to FOLDER/bad-nodes. Runs on the first node and joins the cluster there.
"""

import argparse
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray

from megatron_fipo.errors import UserError, first_line, listed, writing
from megatron_fipo.exit_codes import LOST, USER_ERROR
from megatron_fipo.network import accepts, host_and_port
from megatron_fipo.node.nodes import add_bad_nodes, last_line, read_failures
from megatron_fipo.node.shell import exit_code

PERIOD_S = 1.0


@dataclass(frozen=True)
class Member:
    """A live node of the Ray cluster."""

    name: str
    """Of the node in Slurm, which it gave Ray as its name."""
    address: str
    cpus: int
    gpus: int


def members() -> list[Member]:
    """The live nodes of the cluster that this process has joined."""
    return [
        Member(
            node["NodeName"],
            node["NodeManagerAddress"],
            int(node["Resources"].get("CPU", 0)),
            int(node["Resources"].get("GPU", 0)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def missing(expected: Sequence[str], found: Sequence[Member]) -> list[str]:
    """Expected nodes that are not among the members, in order."""
    names = {member.name for member in found}
    return [name for name in expected if name not in names]


def check_members(expected: Sequence[str], found: Sequence[Member]) -> None:
    """Raise UserError if there are other members than one per expected node with an address of its own, or GPUs differ."""
    strangers = sorted(member.name for member in found if member.name not in expected)
    if strangers or len(found) != len(expected):
        raise UserError(
            f"{len(found)} nodes have joined Ray, and the job has {len(expected)}; not of the job: {listed(strangers, 5) or 'none'}"
        )
    addresses: dict[str, str] = {}
    for member in found:
        other = addresses.setdefault(member.address, member.name)
        if other != member.name:
            raise UserError(
                f"the nodes {other} and {member.name} have both the address {member.address}; name the interface of "
                "the network between them (INTERFACE=...)"
            )
    counts: Mapping[int, list[str]] = {
        count: [member.name for member in found if member.gpus == count]
        for count in {member.gpus for member in found}
    }
    if len(counts) > 1:
        parts = [f"{count} on {listed(names, 3)}" for count, names in sorted(counts.items())]
        raise UserError(
            f"the nodes have different numbers of GPUs: {'; '.join(parts)}; exclude the nodes with fewer"
        )


def wait(expected: Sequence[str], logs: Path, timeout_s: float, deadline: float) -> int:
    """Wait for all nodes until `deadline` (monotonic seconds); returns the exit code and prints what was found."""
    while absent := missing(expected, members()):
        for name, (code, reason) in read_failures(logs).items():
            print(f"node {name} did not join Ray: {reason}", file=sys.stderr)
            if code != USER_ERROR:
                add_bad_nodes(logs, [name])
            return code if code == USER_ERROR else LOST
        if time.monotonic() > deadline:
            print(
                f"{len(absent)} of {len(expected)} nodes did not join Ray within {timeout_s:g} s: {listed(absent, 5)}; the last "
                f"line of {absent[0]}: {last_line(logs, absent[0])}",
                file=sys.stderr,
            )
            add_bad_nodes(logs, absent)
            return LOST
        time.sleep(PERIOD_S)
    found = sorted(
        members(), key=lambda member: expected.index(member.name) if member.name in expected else -1
    )
    check_members(expected, found)
    _write_topology(logs / "topology.txt", found)
    return 0


def _write_topology(path: Path, found: Sequence[Member]) -> None:
    with writing(path):
        lines = [f"{node.name} {node.address} {node.cpus} CPUs {node.gpus} GPUs\n" for node in found]
        path.write_text("".join(lines), encoding="utf-8")
    print(f"{len(found)} nodes have joined: the nodes of the job")


def _join(address: str) -> str | None:
    """Join the cluster; returns what is wrong if that fails, as it does while a busy head starts."""
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        return first_line(error)
    return None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_fipo.node.joined")
    parser.add_argument("--logs", type=Path, required=True, help="log folder of the attempt")
    parser.add_argument("--address", required=True)
    parser.add_argument("--timeout", type=float, required=True)
    parser.add_argument(
        "--lost", action="store_true", help="do not wait: record the nodes that are not there"
    )
    parser.add_argument("nodes", nargs="+", metavar="NODE")
    arguments = parser.parse_args(argv)
    deadline = time.monotonic() + arguments.timeout
    # Ray's client would wait for a minute and then end this process.
    if arguments.lost and not accepts(*host_and_port(arguments.address)):
        print(
            f"Ray's head at {arguments.address} does not answer, so no node is known to be lost",
            file=sys.stderr,
        )
        return LOST
    while (error := _join(arguments.address)) is not None:
        if arguments.lost or time.monotonic() > deadline:
            print(f"cannot join Ray at {arguments.address}: {error}", file=sys.stderr)
            return LOST
        time.sleep(PERIOD_S)
    if arguments.lost:
        absent = missing(arguments.nodes, members())
        print(f"lost nodes: {', '.join(absent) or 'none'}")
        add_bad_nodes(arguments.logs, absent)
        return 0
    return wait(arguments.nodes, arguments.logs, arguments.timeout, deadline)


if __name__ == "__main__":
    sys.exit(exit_code(main))
