"""What a simulation assumes of the cluster and of restarts: neither the configuration nor the machine has it."""

from dataclasses import dataclass

from megatron_fipo.fields import check, number


@dataclass(frozen=True)
class Operation:
    """Assumed, not measured here; printed with every simulation."""

    gpu_mtbf_hours: float = number(50_000.0, above=0)
    """Hours between losses of one GPU, its share of node, network and software included. Llama 3 (arXiv 2407.21783, section
    3.3.4) had 419 unexpected interruptions in 54 days on 16,384 H100: one in 50,700 GPU-hours."""
    engine_restart_s: float = number(120.0, least=0)
    """Seconds from the loss of a rollout engine until another has loaded."""
    trainer_restart_s: float = number(300.0, least=0)
    """Seconds from the loss of a trainer rank until all ranks have loaded the last checkpoint."""
    sleep_s: float = number(5.0, least=0)
    """Seconds in which colocated engines free their memory."""
    wake_s: float = number(5.0, least=0)
    """Seconds in which colocated engines take their memory again."""

    def __post_init__(self) -> None:
        check(self)
