"""Run a function on several real ranks (gloo) inside one test, in a few tenths of a second.

The parent has already imported torch, so the ranks are forked from it instead of started from scratch. That is safe only while the
parent is single-threaded: no Ray and no thread pools in the same pytest process (such tests live in `tests/system`, which
`make test` runs as a process of its own).
"""

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist


def _rank_main(
    function: Callable[..., Any], args: tuple, rank: int, world_size: int, store: str, pipe: Connection
) -> None:
    status = 1
    try:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        torch.manual_seed(1234)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
        result = function(rank, world_size, *args)
        dist.barrier()
        # Plain pickle: a pipe's own pickler would share a tensor's memory, which is gone when this rank exits.
        pipe.send_bytes(pickle.dumps(("ok", result)))
        status = 0
    except BaseException:
        pipe.send_bytes(pickle.dumps(("error", traceback.format_exc())))
    finally:
        pipe.close()
        sys.stdout.flush()
        sys.stderr.flush()
        for child in multiprocessing.active_children():  # os._exit would leave them running
            child.kill()
        os._exit(status)


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 180.0
) -> list[Any]:
    """Call `function(rank, world_size, *args)` on every rank of a gloo world; return the results by rank.

    Results travel by pickle (return plain CPU tensors and numbers). The first error kills the other ranks and is raised.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        processes, pipes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main, args=(function, args, rank, world_size, store, sender)
            )
            process.start()
            sender.close()
            processes.append(process)
            pipes.append(receiver)
        try:
            return _collect(pipes, timeout_s)
        finally:
            for process in processes:
                if process.is_alive():
                    process.join(timeout=5)
                if process.is_alive():
                    os.kill(process.pid, signal.SIGKILL)
                    process.join()


def _collect(pipes: list[Connection], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    while len(results) < len(pipes):
        pending = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(
                f"ranks {[r for r in range(len(pipes)) if r not in results]} gave no result in {timeout_s} s"
            )
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                kind, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise AssertionError(f"rank {rank} died without a word") from None
            if kind == "error":
                raise AssertionError(f"rank {rank}:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]
