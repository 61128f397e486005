"""The thresholds and time limits of the preflight. Each field is an option of `megatron-fipo preflight`."""

from dataclasses import dataclass, replace
from typing import Any

from megatron_fipo.fields import check, choice, number


@dataclass(frozen=True)
class PreflightLimits:
    """What a node and a pair of nodes must have; the defaults are for nodes with GPUs. 0 switches a threshold off."""

    gpus_per_node: int = number(0, least=0)
    """GPUs that each node must have; 0 requires only the same number on all nodes."""
    dtype: str = choice("bfloat16", "float32")
    """Dtype of the matrix product that each GPU must compute without error: the model's."""
    xid_hours: float = number(24.0, least=0)
    """A GPU with a hardware error (XID) in the kernel log of the last so many hours is a fault."""
    min_tmp_gib: float = number(10.0, least=0)
    """Least free space of /tmp, in GiB."""
    min_shm_gib: float = number(8.0, least=0)
    """Least free space of /dev/shm, in GiB."""
    min_open_files: int = number(65_535, least=0)
    """Least limit of open files (ulimit -n)."""
    min_locked_memory_gib: float = number(64.0, least=0)
    """Least limit of locked memory (ulimit -l) of a node with RDMA devices, in GiB."""
    max_clock_skew_s: float = number(1.0, least=0)
    """Largest difference of a node's clock from the head's, in seconds."""
    min_bandwidth_gb_per_s: float = number(10.0, least=0)
    """Least bandwidth of a pair of nodes in each direction, over all its GPUs, in GB/s (1e9 bytes per second)."""
    min_all_reduce_gb_per_s: float = number(10.0, least=0)
    """Least bus bandwidth of an all-reduce over all nodes, in GB/s."""
    join_timeout_s: float = number(60.0, above=0)
    """Seconds after which a node that has not answered is missing."""
    check_timeout_s: float = number(45.0, above=0)
    """Seconds that a check of one node may take."""
    pair_timeout_s: float = number(15.0, above=0)
    """Seconds that a pair of nodes may wait for each other, and for data."""
    network_timeout_s: float = number(60.0, above=0)
    """Seconds that all exchanges of up to 16 nodes may take together; more nodes have proportionally more."""

    def __post_init__(self) -> None:
        check(self)

    def exchange_time_s(self, nodes: int) -> float:
        """Seconds that all exchanges of so many nodes may take."""
        return self.network_timeout_s * max(1.0, nodes / 16)


def limits_for(gpus: bool, between_gpus: bool, chosen: dict[str, Any]) -> PreflightLimits:
    """The limits of nodes with or without GPUs, whose exchanges were between GPUs or not, with what the user has chosen."""
    limits = PreflightLimits()
    if not gpus:
        limits = replace(limits, min_tmp_gib=2.0, min_shm_gib=1.0, min_open_files=4096)
    if not between_gpus:
        limits = replace(limits, min_bandwidth_gb_per_s=0.0, min_all_reduce_gb_per_s=0.0)
    return replace(limits, **chosen)
