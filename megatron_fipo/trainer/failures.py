"""What an exception of a rank means for the run: an error of the user, something that was lost, or a bug."""

import torch
import torch.distributed as dist

from megatron_fipo.errors import LostError, UserError, first_line
from megatron_fipo.weight_sync.nccl import TransferStuckError

FAULTS_OF_KERNELS = ("device-side assert", "illegal memory access", "misaligned address", "invalid argument")
"""In the message of a CUDA error that a kernel's bug causes. Others come from a GPU, its driver or its links."""
GLOO = "gloo/"
"""In the message of gloo's errors, which have no type of their own: the source file."""


def run_error(error: Exception) -> UserError | None:
    """The error to end the run with; None for a bug, which keeps its type and traceback."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return UserError(
            f"the GPU has too little memory ({first_line(error)}); lower batch.max_tokens_per_micro_batch, raise a parallel size, "
            "or set model.recompute=full"
        )
    if isinstance(error, (dist.DistError, TransferStuckError)) or _of_gloo(error) or _of_device(error):
        return LostError(f"{type(error).__name__}: {first_line(error)}")
    return None


def _of_gloo(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and GLOO in str(error)


def _of_device(error: Exception) -> bool:
    return isinstance(error, torch.AcceleratorError) and not any(
        fault in str(error) for fault in FAULTS_OF_KERNELS
    )
