"""Files in an attempt's log folder that say how each node does."""

import re
from pathlib import Path

from megatron_fipo.errors import writing

BAD_NODES = "bad-nodes"
ADDRESS = "ray_address"
STEP_OUTPUTS = ("first-node.log", "other-nodes.log")
"""Output of the steps that start Ray. srun writes them on the first node, so they need no shared file system."""
_FAILURE = re.compile(r"^node (?P<node>\S+) failed with (?P<code>\d+): (?P<reason>.*)$", re.MULTILINE)


def node_log(logs: Path, node: str) -> Path:
    """Output of Ray's start on a node."""
    return logs / "nodes" / f"{node}.log"


def failure(node: str, code: int, reason: str) -> str:
    """The line by which a node tells the first one, through srun, why it is not part of the cluster."""
    return f"node {node} failed with {code}: {' '.join(reason.split())}"


def read_failures(logs: Path) -> dict[str, tuple[int, str]]:
    """Exit code and reason of each node that has failed, from what srun has written on the first node."""
    found = {}
    for name in STEP_OUTPUTS:
        path = logs / name
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        for match in _FAILURE.finditer(text):
            found[match["node"]] = int(match["code"]), match["reason"]
    return found


def last_line(logs: Path, node: str) -> str:
    """The last line that a node has logged."""
    try:
        lines = node_log(logs, node).read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return "it has logged nothing"
    return next((line.strip() for line in reversed(lines) if line.strip()), "it has logged nothing")


def bad_nodes(logs: Path) -> list[str]:
    """Nodes that the next attempt must not use."""
    path = logs / BAD_NODES
    return sorted(set(path.read_text(encoding="utf-8", errors="replace").split())) if path.exists() else []


def add_bad_nodes(logs: Path, nodes: list[str]) -> None:
    """Exclude nodes from the next attempt. Raises UserError."""
    path = logs / BAD_NODES
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.writelines(f"{node}\n" for node in nodes)
