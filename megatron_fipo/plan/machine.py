"""What this machine offers to ranks."""

import os

from megatron_fipo.config import Machine


def this_machine() -> Machine:
    """CPU cores that this process may use, and visible CUDA devices."""
    import torch

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(cpus=cpus, gpus=torch.cuda.device_count())
