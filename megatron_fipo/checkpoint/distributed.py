"""Weights and optimizer state as a Megatron-Core distributed checkpoint (`torch_dist` format).

The files are independent of the parallel layout that wrote them and have the same names on CPU and GPU. The
caller (`run_dir/run_directory.py`) decides in which folder a checkpoint is and when it counts as complete.
Megatron's format contains pickles (its index, the optimizer's hyperparameters), which are read as data alone
(`plain_pickles.py`).

Memory. N is the number of parameters of this rank's tensor × pipeline shard, D the number of data × context
ranks; weights and optimizer are 14N bytes. A rank stores the 1/D of the optimizer's state that it has
(`optimizer_blocks.py`) and 1/D of the weights, which all D ranks have. So a save copies 14N/D bytes from the
device to the host, holds them until they are written, and needs no device memory and no gather. (Exceptions,
for a moment on the device: moments that are not float32 are converted, at most 8N/D bytes, and FP8 weights, 2N.)
Loading fills the rank's own state in place, and the rank's share of the weights is read and broadcast.
"""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CONFIG_FNAME
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, TemporalAsyncCaller
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch.distributed.checkpoint.api import CheckpointException

from megatron_fipo import progress
from megatron_fipo.checkpoint.fit import check_fit
from megatron_fipo.checkpoint.optimizer_blocks import (
    distributed_parts,
    loadable_optimizer_state,
    sharded_optimizer_state,
)
from megatron_fipo.checkpoint.plain_optimizer import load_plain_state, sharded_plain_state
from megatron_fipo.checkpoint.plain_pickles import INDEX_FILE, plain_pickles
from megatron_fipo.checkpoint.rank_errors import (
    join_by_rank,
    raise_on_all_ranks,
    reasons_by_rank,
    write_error,
    write_obstacle,
)
from megatron_fipo.checkpoint.stacked_axes import with_ordinary_axes, without_leading
from megatron_fipo.errors import UserError
from megatron_fipo.model.mcore import (
    ASYNC_SAVE,
    COMMON_STATE_FILE,
    count_steps_once,
    drop_classes,
    full_precision,
    is_quantized,
    make_optimizer_state,
    report_loaded_tensors,
)

POLL_S = 0.05
SIZE_EVERY_S = 1.0
"""Seconds between two looks at how much the writers have written."""


@dataclass(frozen=True)
class _Pending:
    """A save whose writers may still be running."""

    folder: Path
    request: AsyncRequest
    caller: TemporalAsyncCaller
    process: BaseProcess | None
    """This rank's writer. None if it has nothing to write, or if no process could be started."""
    problem: str | None
    """Why no process could be started."""


class CheckpointWriter:
    """One rank's part of saving: `start`, then `finished` until it returns True. One save at a time.

    Each rank forks a writer that has a snapshot of the memory, so training continues immediately. The data ×
    context ranks divide the writing of their common weights. No tensors are kept between saves.
    """

    def __init__(self) -> None:
        self.files: list[str] = []
        """Names of the files in the folder of the last save that this rank writes."""
        self._pending: _Pending | None = None

    def start(
        self,
        modules: list[torch.nn.Module],
        optimizer: MegatronOptimizer | None,
        folder: Path,
        asynchronous: bool,
    ) -> None:
        """Start to write into an existing empty folder.

        Without `asynchronous`, also wait until it is written.

        Afterwards weights and optimizer may change in place. Without an optimizer the checkpoint has weights
        only.

        Collective over all ranks: all-gathers of a few objects (the plan: a few hundred bytes per tensor). The
        host gets 14N/D bytes (module docstring). UserError on every rank if the folder cannot be written to.
        """
        if self._pending is not None:
            raise RuntimeError(
                "the previous save is not finished; call `finished` until it returns True first"
            )
        raise_on_all_ranks(folder, write_obstacle(folder))
        request = dist_checkpointing.save(
            _sharded_state(modules, optimizer, is_loading=False),
            str(folder),
            FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy(), _replicas()),
            async_sharded_save=True,
            content_metadata={"architecture": _architecture(modules)},
            **ASYNC_SAVE,
        )
        self.files = _files_of(request)
        self._pending = _fork_writer(folder, request)
        if not asynchronous:
            self.finished(blocking=True)

    def finished(self, blocking: bool) -> bool:
        """Whether every rank's files are complete (or nothing is pending).

        With `blocking`, wait until they are.

        Collective over all ranks: an all-reduce of one number per check; at the end a gather of the written
        records (a few hundred bytes per tensor), the index written by rank 0, and a barrier.

        UserError with the reason, on every rank, if a writer failed, LostError if one was killed; the save is then
        over and its folder is invalid. If rank 0 fails to write the index after all data was written, only rank 0
        raises, and the others wait for it until the caller ends them.
        """
        pending = self._pending
        if pending is None:
            return True
        written, look_at = 0, 0.0
        while not pending.caller.is_current_async_call_done(blocking=False, no_dist=False):
            if not blocking:
                return False
            time.sleep(POLL_S)
            if time.monotonic() >= look_at:
                look_at = time.monotonic() + SIZE_EVERY_S
                if (size := _size(pending.folder, self.files)) > written:
                    written = size
                    progress.advance()
        self._pending = None
        problems: dict[int, str] = {}
        try:
            # Also if a writer failed: this removes the results of the others from Megatron's queue.
            for finalize in pending.request.finalize_fns:
                finalize()
        except CheckpointException as error:
            problems = reasons_by_rank(error)
        except OSError as error:
            raise write_error(pending.folder, str(error)) from None
        own = pending.problem or _writer_failure(pending.process)
        killed = pending.process is not None and (pending.process.exitcode or 0) < 0
        raise_on_all_ranks(pending.folder, {**problems, **({dist.get_rank(): own} if own else {})}, killed)
        return True


def load_checkpoint(modules: list[torch.nn.Module], optimizer: MegatronOptimizer, folder: Path) -> None:
    """Load weights and optimizer state in place, written by any layout.

    Learning rate, weight decay, betas and epsilon keep the values of the current settings. Collective over
    all ranks: gathers of a few objects (a few hundred bytes per tensor), then each data × context rank reads
    its own state and its share of the weights, and broadcasts the latter within the group (2N bytes for bf16
    weights). UserError on every rank, with nothing changed, if the checkpoint is of another model, is incomplete
    or has an unreadable index. UserError, with weights and optimizer undefined, if the data is damaged.
    """
    state = _load(modules, optimizer, folder)["optimizer"]
    parts = distributed_parts(optimizer)
    with torch.no_grad():
        for name, part in parts.items():
            part.load_state_dict(loadable_optimizer_state(part, state, name))
        if not parts:
            load_plain_state(optimizer, state)
    for group in optimizer.param_groups:
        group.update(
            betas=(optimizer.config.adam_beta1, optimizer.config.adam_beta2), eps=optimizer.config.adam_eps
        )
    count_steps_once(optimizer)


def load_weights_only(modules: list[torch.nn.Module], folder: Path) -> None:
    """Load the weights only, also from a checkpoint without optimizer state. Otherwise as `load_checkpoint`.

    An optimizer with its own copies of the weights needs `reload_model_params()` afterwards.
    """
    _load(modules, None, folder)


# --- the state ----------------------------------------------------------------------------------------------


def _names(modules: list[Any]) -> list[str]:
    return ["model"] if len(modules) == 1 else [f"model{index}" for index in range(len(modules))]


def _sharded_state(
    modules: list[Any], optimizer: MegatronOptimizer | None, is_loading: bool
) -> dict[str, Any]:
    """Megatron's sharded state of this rank. No collectives."""
    metadata = ensure_metadata_has_dp_cp_group({"distrib_optim_sharding_type": "fully_reshardable"})
    state: dict[str, Any] = {}
    for name, module in zip(_names(modules), modules, strict=True):
        tensors = module.sharded_state_dict(metadata=metadata)
        # Without the objects (`_extra_state`): they differ between Transformer Engine and other layers, and
        # contain only FP8's delayed scales. These start from ones after a resume, and the first updates
        # recompute them.
        state[name] = {key: value for key, value in tensors.items() if not isinstance(value, ShardedObject)}
    if optimizer is not None:
        make_optimizer_state(optimizer)
        parts = distributed_parts(optimizer)
        state["optimizer"] = (
            sharded_optimizer_state(parts, dict(state), is_loading)
            if parts
            else sharded_plain_state(optimizer, dict(state), is_loading, metadata)
        )
        drop_classes(optimizer, state["optimizer"])
    for name in _names(modules):  # after the optimizer's part, which identifies parameters by object identity
        for key, value in state[name].items():
            if is_quantized(value.data):
                value.data = full_precision(value.data)
            state[name][key] = with_ordinary_axes(value)
    return state


def _replicas() -> dist.ProcessGroup:
    """The ranks with the same weights."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _architecture(modules: list[Any]) -> dict[str, Any]:
    return asdict(modules[0].architecture)


def _load(modules: list[Any], optimizer: MegatronOptimizer | None, folder: Path) -> dict[str, Any]:
    """Load weights into the modules; returns the loaded state, including the optimizer's part."""
    state = _sharded_state(modules, optimizer, is_loading=True)
    with plain_pickles():
        check_fit(_architecture(modules), state, folder)
        report_loaded_tensors(progress.advance)
        strategy = FullyParallelLoadStrategyWrapper(
            get_default_load_sharded_strategy(str(folder)), _replicas()
        )
        try:
            loaded = dist_checkpointing.load(state, str(folder), strategy)
        except CheckpointException as error:
            raise UserError(
                f"checkpoint {folder} is damaged: {join_by_rank(reasons_by_rank(error))}; use an earlier one"
            ) from None
    for name, module in zip(_names(modules), modules, strict=True):
        here = module.state_dict()
        tensors = {key: without_leading(value, here[key].dim()) for key, value in loaded[name].items()}
        module.load_state_dict(tensors, strict=False)  # `_extra_state` objects are not stored
    return loaded


# --- the writer process -------------------------------------------------------------------------------------


def _files_of(request: AsyncRequest) -> list[str]:
    """The files that this rank writes: its data, and on rank 0 the index and what describes the checkpoint."""
    _, buckets, _ = request.async_fn_args or (None, [], None)
    names = [name for _, name, _ in buckets]
    if dist.get_rank() == 0:
        names += [INDEX_FILE, CONFIG_FNAME, *filter(None, [COMMON_STATE_FILE])]
    return names


def _size(folder: Path, names: Sequence[str]) -> int:
    """Bytes in these files so far."""
    return sum((folder / name).stat().st_size for name in names if (folder / name).exists())


def _fork_writer(folder: Path, request: AsyncRequest) -> _Pending:
    if request.async_fn is not None:
        request = request._replace(async_fn=partial(_write, request.async_fn))
    caller, problem = TemporalAsyncCaller(), None
    try:
        caller.schedule_async_call(request)
    except OSError as error:  # on this rank only; the others get it in `finished`
        problem = f"no writer could be started: {error}"
    # Only the finalizers of the request are still needed; its arguments hold tensors.
    request = request._replace(async_fn=None, async_fn_args=(), preload_fn=None)
    return _Pending(folder, request, caller, caller.process, problem)


def _write(write: Any, *arguments: Any) -> None:
    """The body of a rank's writer process."""
    # Ctrl-C reaches every process of a terminal. The driver decides which of them stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, _end_with_child)
    write(*arguments)


def _end_with_child(signum: int, frame: FrameType | None) -> None:
    """End this writer in the same way as a child that failed.

    Megatron-Core 0.16 would wait forever for a killed child.
    """
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if code := os.waitstatus_to_exitcode(ended[1]):
                for child in active_children():
                    child.kill()
                if code < 0:
                    os.kill(os.getpid(), -code)
                os._exit(code)


def _writer_failure(process: BaseProcess | None) -> str | None:
    """How a writer ended, or None if it ended successfully."""
    if process is None or process.exitcode == 0:
        return None
    if process.exitcode is not None and process.exitcode < 0:
        return f"its writer was killed by {signal.Signals(-process.exitcode).name} (out of memory?)"
    return f"its writer ended with exit code {process.exitcode}; its output has the reason"
