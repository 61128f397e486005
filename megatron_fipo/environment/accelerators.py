"""What this process finds of GPUs and of the packages that speed them up. Nothing is imported but torch."""

from importlib.util import find_spec

import torch

from megatron_fipo.config.gpu_rules import Accelerators
from megatron_fipo.environment.packages import has_nvidia_apex, installed_version


def find_accelerators() -> Accelerators:
    """The GPUs that this process sees, and the installed Transformer Engine and apex."""
    devices = range(torch.cuda.device_count())
    return Accelerators(
        capability=min((torch.cuda.get_device_capability(device) for device in devices), default=None),
        cuda=torch.version.cuda,
        transformer_engine=installed_version("transformer_engine", "transformer-engine"),
        apex=has_nvidia_apex(),
    )


def can_compile() -> bool:
    """Whether torch.compile, by which Megatron-Core fuses small operations, makes GPU kernels here."""
    return torch.cuda.is_available() and find_spec("triton") is not None
