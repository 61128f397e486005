"""What a measuring process gets to know from the one that starts it."""

from dataclasses import dataclass
from pathlib import Path

from megatron_fipo.config import Config, load_stored_config
from megatron_fipo.families.registry import read_model_config
from megatron_fipo.plan.case import Case
from megatron_fipo.plan.machine import PRECISIONS
from megatron_fipo.plan.machine_file import load_machine

CONFIG = "config.yaml"
FIGURES = {
    "transfers": ("memory", "host"),
    "products": ("decode_weights", *(f"products.{name}" for name in PRECISIONS)),
    "layer": ("attention_forward", "attention_backward", "layer_host", "layer", "reserved_bytes"),
    "disk": ("disk",),
}
"""What each part of a rank's process measures."""


@dataclass(frozen=True)
class Job:
    """The run to measure for, and how long."""

    folder: str
    """With the run's configuration (`CONFIG`), and space for files of these processes."""
    base: str
    """The machine whose figures stand in; the planner's functions need one."""
    disk: str
    """Folder in whose file system the run would write."""
    budget_s: float
    """Seconds to measure in."""
    ranks: int
    """Processes of a collective."""
    parent: int
    """Process id; its end ends the measuring."""

    def config(self) -> Config:
        return load_stored_config(Path(self.folder) / CONFIG)

    def case(self) -> Case:
        config = self.config()
        family, architecture = read_model_config(config.model.path)
        return Case(config, family, architecture, load_machine(self.base))
