"""Errors of several ranks while a distributed checkpoint is saved or loaded, as one UserError on every rank."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_fipo.errors import LostError, UserError

RESERVE_BYTES = 16 * 2**20
"""More than the size of the files that only rank 0 writes: the index and the common state."""


def write_obstacle(folder: Path) -> dict[int, str]:
    """By rank: why this rank cannot write into the folder.

    Checked before, because the others wait while rank 0 writes.
    """
    rank = dist.get_rank()
    if not folder.is_dir():
        return {rank: "there is no such folder (run_dir must be on a disk that all nodes share)"}
    try:
        if rank == 0:
            with tempfile.TemporaryFile(dir=folder) as file:
                os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)
    except OSError as error:
        return {rank: str(error.strerror)}
    return {}


def raise_on_all_ranks(folder: Path, problems: dict[int, str], lost: bool = False) -> None:
    """UserError on every rank if any rank has a problem. A rank's report about itself takes precedence.

    It is a LostError if this process or another gives `lost`: its writer was killed. One gather.
    """
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (problems, lost))
    reports = [found for found, _ in gathered]
    known = {rank: text for found in reports for rank, text in found.items()}
    known.update((rank, found[rank]) for rank, found in enumerate(reports) if rank in found)
    if known:
        kind = LostError if any(lost for _, lost in gathered) else UserError
        raise write_error(folder, join_by_rank(known), kind)


def write_error(folder: Path, reason: str, kind: type[UserError] = UserError) -> UserError:
    """An error of a failed save, with the free space of the disk and, unless it is a loss, how to resume."""
    free = f" ({shutil.disk_usage(folder).free // 2**20} MiB free)" if folder.is_dir() else ""
    return kind(
        f"cannot write the checkpoint {folder}{free}: {reason}"
        + (
            ""
            if kind is LostError
            else "; fix this, then run the same command to resume from the previous checkpoint"
        )
    )


def reasons_by_rank(error: CheckpointException) -> dict[int, str]:
    """The reasons by rank. When Megatron saves, only rank 0 receives them."""
    return {rank: one_line(reason) for rank, (reason, _) in error.failures.items()}


def join_by_rank(reasons: dict[int, str], limit: int = 3) -> str:
    """`rank 0: ...; rank 1: ...`, with at most `limit` ranks and the number of the others."""
    more = f" and {len(reasons) - limit} more ranks" if len(reasons) > limit else ""
    return "; ".join(f"rank {rank}: {reasons[rank]}" for rank in sorted(reasons)[:limit]) + more


def one_line(error: BaseException) -> str:
    """The type and message of an error in one line of at most 300 characters."""
    if isinstance(error, CheckpointException):  # its message is a traceback
        error = next((reason for reason, _ in error.failures.values()), error)
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
