"""What a process of `network.py` gets to know from the one that starts it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """What one process has to do, and where the store is."""

    address: str
    port: int
    names: tuple[str, ...]
    """The nodes that answered; the head is the first."""
    node: int
    """Index of this node in `names`."""
    local_rank: int
    local_ranks: int
    """Processes per node, the same on all."""
    gpus: bool
    timeout_s: float
    """For a pair to meet, and for each message."""
