"""What this machine offers to ranks."""

import os

from megatron_fipo.config import Machine


def this_machine() -> Machine:
    """CPU cores that this process may use, visible CUDA devices, and what is installed for them."""
    import torch

    from megatron_fipo.environment.accelerators import find_accelerators

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(cpus=cpus, gpus=torch.cuda.device_count(), accelerators=find_accelerators())
