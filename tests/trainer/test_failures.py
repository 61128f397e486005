"""What ends a run: the user's errors, losses and bugs are told apart by the exceptions that libraries really raise."""

import multiprocessing
import os
from datetime import timedelta
from multiprocessing.connection import Connection

import pytest
import torch
import torch.distributed as dist

from megatron_fipo.errors import LostError, UserError
from megatron_fipo.trainer.failures import run_error
from megatron_fipo.weight_sync.nccl import TransferStuckError


def _reduce(rank: int, store: str, dies: bool, pipe: Connection) -> None:
    """Rank 1 ends or sleeps; rank 0 sends the error of its all-reduce."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60 if dies else 2),
    )
    dist.barrier()
    if rank == 1:
        if not dies:
            pipe.recv()
        os._exit(1)
    try:
        dist.all_reduce(torch.ones(1))
    except Exception as error:
        found = run_error(error)
        pipe.send((type(found), str(found), repr(error)))
    os._exit(0)


@pytest.mark.parametrize("dies", [True, False])
def test_a_collective_without_its_peer_is_lost(tmp_path, dies):
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(2)]
    ranks = [
        context.Process(target=_reduce, args=(rank, tmp_path / "store", dies, pipes[rank][1]))
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    assert pipes[0][0].poll(100), "rank 0 did not end"
    kind, message, raised = pipes[0][0].recv()
    pipes[1][0].send("end")
    for rank in ranks:
        rank.join()
    assert kind is LostError, raised
    assert "\n" not in message


def test_an_error_of_nccl_or_of_a_transfer_is_lost():
    for error in (
        dist.DistBackendError(
            "NCCL error in: NCCLUtils.cpp: remote process exited or there was a network error"
        ),
        dist.DistNetworkError("the client socket has timed out"),
        TransferStuckError("the NCCL broadcast cannot end"),
        torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
    ):
        assert isinstance(run_error(error), LostError)


def test_too_little_gpu_memory_is_the_users_to_fix_and_kernels_have_bugs():
    full = run_error(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has"))
    assert type(full) is UserError
    assert "max_tokens_per_micro_batch" in str(full)
    assert run_error(torch.AcceleratorError("CUDA error: device-side assert triggered")) is None
    assert run_error(ZeroDivisionError("no rows")) is None
    assert run_error(RuntimeError("shape mismatch")) is None
    refused = UserError("no such model; give another")
    assert run_error(refused) is refused
