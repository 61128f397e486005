"""The choice between Triton kernels and plain torch. Both give the same numbers; it is made per call, from the tensors."""

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from megatron_fipo.objective.kernels import OLDEST_CAPABILITY

KERNELS = ("auto", "torch", "triton")


def takes_triton(kernels: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether Triton computes on `tensor`: with `auto` if it can on a GPU, with `triton` always, with `torch` never.

    ValueError, with the reason, if `kernels` is `triton` and it cannot run: no Triton, a dtype outside `dtypes`, a GPU
    that is too old, or a CPU tensor outside Triton's interpreter (TRITON_INTERPRET=1, for tests).
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels must be one of {', '.join(KERNELS)}, not {kernels!r}")
    if kernels == "torch" or (kernels == "auto" and not tensor.is_cuda):
        return False
    reason = _obstacle(tensor.device) or (
        None if tensor.dtype in dtypes else f"its kernels do not take {tensor.dtype}"
    )
    if kernels == "triton" and reason:
        raise ValueError(f"kernels is triton, but {reason}; use auto or torch")
    return reason is None


def kernels_obstacle(kernels: str, device: torch.device) -> str | None:
    """Why `kernels` cannot compute on `device`, for checks before a run starts; None if it can (`auto`, `torch`: always)."""
    return _obstacle(device) if kernels == "triton" else None


def describe_kernels(kernels: str, device: torch.device) -> str:
    """What computes head, loss and SwiGLU on `device`, for the log: "Triton 3.6.0", or "plain torch" and why Triton is not used."""
    reason = _obstacle(device)
    if kernels != "torch" and reason is None:
        import triton

        return f"Triton {triton.__version__}"
    if kernels == "torch" or device.type != "cuda":
        return "plain torch"
    return f"plain torch, the same numbers more slowly: {reason}"


def _obstacle(device: torch.device) -> str | None:
    """Why Triton cannot run on `device`, or None."""
    if not _has_triton():
        return "Triton is not installed (pip install triton)"
    if device.type != "cuda":
        return None if os.environ.get("TRITON_INTERPRET") == "1" else f"the tensors are on {device.type}"
    if _capability(device) < OLDEST_CAPABILITY:
        found, needed = (
            ".".join(map(str, capability)) for capability in (_capability(device), OLDEST_CAPABILITY)
        )
        return f"this GPU has compute capability {found} and Triton needs {needed}"
    return None


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
