"""What this process finds of GPUs and of the packages that speed them up. Nothing is imported but torch."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from megatron_fipo.config.precision import Accelerators


def find_accelerators() -> Accelerators:
    """The GPUs that this process sees, and the installed Transformer Engine."""
    devices = range(torch.cuda.device_count())
    return Accelerators(
        capability=min((torch.cuda.get_device_capability(device) for device in devices), default=None),
        cuda=torch.version.cuda,
        transformer_engine=installed_version("transformer_engine", "transformer-engine"),
    )


def installed_version(module: str, package: str) -> str | None:
    """Version of the installed package, "unknown version" where it carries none, None where `module` cannot be imported."""
    try:
        if find_spec(module) is None:
            return None
    except (ImportError, ValueError):
        return None
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown version"


def can_compile() -> bool:
    """Whether torch.compile, by which Megatron-Core fuses small operations, makes GPU kernels here."""
    return torch.cuda.is_available() and find_spec("triton") is not None
