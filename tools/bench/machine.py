"""What the benchmarks say and ask about the machine they run on."""

import os
import platform
from pathlib import Path


def describe_machine() -> str:
    """Processor, cores, system and the version of torch."""
    import torch

    model = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")),
        ": ?",
    )
    return f"{model.split(':')[1].strip()}, {os.cpu_count()} cores, {platform.system()}, torch {torch.__version__}"


def resident(field: str) -> int:
    """A size of this process from /proc/self/status, in bytes: `VmRSS` is memory now, `VmHWM` the most so far."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":")
    )
    return int(line.split()[1]) * 1024
