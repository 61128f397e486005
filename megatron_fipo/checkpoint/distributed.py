"""Weights and optimizer state as a Megatron-Core distributed checkpoint (`torch_dist` format).

The files are independent of the parallel layout that wrote them, and carry the same names on CPU and GPU. Which folder a
checkpoint lives in, and when it counts as complete, is the caller's business (`run_dir/run_directory.py`). Megatron's format holds
pickles (its index, the optimizer's hyper-parameters), so load only folders that you trust.

Memory. N is the number of parameters of this rank's tensor × pipeline shard, D the number of data × context ranks. Optimizer
state is stored per parameter, as it must be for any layout to read it, while the distributed optimizer keeps it in flat slices
of 1/D. So saving all-gathers it over the data × context group, one fp32 bucket of one of its three parts at a time. Without
`parallel.overlap_communication` there is one bucket: 4N bytes of device memory for a moment (with it 160 MB or so, but only on
the first pipeline stage). On the host every rank holds all of it, 12N bytes, while `start` runs; loading needs as much. After
`start`, a rank holds its 1/D of the state and weights until they are written. Megatron can gather on the host, over gloo and to
one rank of D, instead: no device memory, but the others then have nothing to write, and training waits for one network link.
"""

import os
import shutil
import signal
import tempfile
import time
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
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
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

from megatron_fipo.checkpoint.safetensors_folder import listing
from megatron_fipo.errors import UserError
from megatron_fipo.model.mcore import (
    ASYNC_SAVE,
    COMMON_STATE_FILE,
    count_steps_once,
    drop_classes,
    full_precision,
    is_quantized,
    make_optimizer_state,
)

POLL_S = 0.05
ROOM_BYTES = 16 * 2**20
"""More than the files that rank 0 alone writes: the index and the common state."""


@dataclass(frozen=True)
class _Pending:
    """A save whose writers may still be at work."""

    folder: Path
    request: AsyncRequest
    caller: TemporalAsyncCaller
    process: BaseProcess | None
    """This rank's writer; None where it has nothing to write, or where no process could be started."""
    problem: str | None
    """Why none could be started."""


class CheckpointWriter:
    """One rank's part in saving: `start`, then `finished` until it is True. One save at a time.

    Each rank forks a writer that sees memory as it was then, so training goes on at once. The data × context ranks share the
    writing of what they hold in common. Nothing is remembered between saves: each looks at the model anew.
    """

    def __init__(self) -> None:
        self._pending: _Pending | None = None

    def start(
        self,
        modules: list[torch.nn.Module],
        optimizer: MegatronOptimizer | None,
        folder: Path,
        asynchronous: bool,
    ) -> None:
        """Begin to write into an existing empty folder; without `asynchronous`, also wait until it is written.

        Afterwards weights and optimizer may change in place. Without an optimizer the checkpoint holds weights alone.

        Collective over all ranks: all-gathers of a few objects (the plan: some hundred bytes per tensor), and the all-gather of
        the optimizer state, 12N bytes (module docstring). UserError on every rank if the folder cannot be written to.
        """
        if self._pending is not None:
            raise RuntimeError("the save before this one is not finished; wait for `finished` first")
        _raise_together(folder, _obstacle(folder))
        request = dist_checkpointing.save(
            _sharded_state(modules, optimizer, is_loading=False),
            str(folder),
            FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy(), _replicas()),
            async_sharded_save=True,
            content_metadata={"architecture": _architecture(modules)},
            **ASYNC_SAVE,
        )
        self._pending = _fork_writer(folder, request)
        if not asynchronous:
            self.finished(blocking=True)

    def finished(self, blocking: bool) -> bool:
        """Whether every rank's files are complete (or nothing is pending); with `blocking`, wait until they are.

        Collective over all ranks: an all-reduce of one number per look; at the end a gather of what was written (some hundred
        bytes per tensor), the index written by rank 0, and a barrier.

        UserError with the reason, on every rank, if a writer failed or was killed; the save is then over and its folder worth
        nothing. Should rank 0 fail to write the index, after all data was written, then it alone raises, while the others
        wait for it until the caller ends them.
        """
        pending = self._pending
        if pending is None:
            return True
        while not pending.caller.is_current_async_call_done(blocking=False, no_dist=False):
            if not blocking:
                return False
            time.sleep(POLL_S)
        self._pending = None
        problems: dict[int, str] = {}
        try:
            # Also where a writer failed: this is what takes the results of the others out of Megatron's queue.
            for finalize in pending.request.finalize_fns:
                finalize()
        except CheckpointException as error:
            problems = _reasons(error)
        except OSError as error:
            raise _refusal(pending.folder, str(error)) from None
        own = pending.problem or _end_of(pending.process)
        _raise_together(pending.folder, {**problems, **({dist.get_rank(): own} if own else {})})
        return True


def load_checkpoint(modules: list[torch.nn.Module], optimizer: MegatronOptimizer, folder: Path) -> None:
    """Read weights and optimizer state back in place, whatever layout wrote them.

    Learning rate, weight decay, betas and epsilon stay those of the present settings. Collective over all ranks: gathers of a
    few objects (some hundred bytes per tensor), then each data × context rank reads its share and broadcasts it within the
    group (14N bytes for bf16 weights). UserError on every rank, and nothing changed, where the checkpoint is of another model,
    lacks something or has an unreadable index; UserError with weights undefined where the data turn out to be damaged.
    """
    loaded = _load(modules, optimizer, folder)
    with torch.no_grad():
        optimizer.load_state_dict(loaded["optimizer"])
    for group in optimizer.param_groups:
        group.update(
            betas=(optimizer.config.adam_beta1, optimizer.config.adam_beta2), eps=optimizer.config.adam_eps
        )
    count_steps_once(optimizer)


def load_weights_only(modules: list[torch.nn.Module], folder: Path) -> None:
    """Read the weights alone, also from a checkpoint that holds nothing else. Otherwise as `load_checkpoint`.

    An optimizer with copies of its own takes them over by `reload_model_params()`.
    """
    _load(modules, None, folder)


# --- the state ---------------------------------------------------------------------------------------------------------------


def _names(modules: list[Any]) -> list[str]:
    return ["model"] if len(modules) == 1 else [f"model{index}" for index in range(len(modules))]


def _sharded_state(
    modules: list[Any], optimizer: MegatronOptimizer | None, is_loading: bool
) -> dict[str, Any]:
    """Megatron's description of what this rank holds. Saving, it gathers the optimizer state (module docstring)."""
    metadata = ensure_metadata_has_dp_cp_group({"distrib_optim_sharding_type": "fully_reshardable"})
    state: dict[str, Any] = {}
    for name, module in zip(_names(modules), modules, strict=True):
        tensors = module.sharded_state_dict(metadata=metadata)
        # Without the objects (`_extra_state`), which differ between Transformer Engine and other layers and hold nothing but FP8's
        # delayed scales. Those start from ones after a resume, and the first updates find them anew.
        state[name] = {key: value for key, value in tensors.items() if not isinstance(value, ShardedObject)}
    if optimizer is not None:
        make_optimizer_state(optimizer)
        state["optimizer"] = optimizer.sharded_state_dict(
            dict(state), is_loading=is_loading, metadata=metadata
        )
        drop_classes(optimizer, state["optimizer"])
    for name in _names(modules):  # not before the optimizer's part, which knows parameters by identity
        for value in state[name].values():
            if is_quantized(value.data):
                value.data = full_precision(value.data)
    return state


def _replicas() -> dist.ProcessGroup:
    """The ranks that hold the same weights."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _architecture(modules: list[Any]) -> dict[str, Any]:
    return asdict(modules[0].architecture)


def _load(modules: list[Any], optimizer: MegatronOptimizer | None, folder: Path) -> dict[str, Any]:
    """Weights into the modules; returns what was loaded, with the optimizer's part."""
    state = _sharded_state(modules, optimizer, is_loading=True)
    _check_fit(modules, state, folder)
    strategy = FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(str(folder)), _replicas())
    try:
        loaded = dist_checkpointing.load(state, str(folder), strategy)
    except CheckpointException as error:
        raise UserError(
            f"checkpoint {folder} is damaged: {_by_rank(_reasons(error))}; use an earlier one"
        ) from None
    for name, module in zip(_names(modules), modules, strict=True):
        module.load_state_dict(loaded[name], strict=False)  # all but the objects left out above
    return loaded


def _check_fit(modules: list[Any], state: dict[str, Any], folder: Path) -> None:
    """UserError on every rank if the checkpoint cannot be read or is not of this model. One gather of all tensors' names."""
    here, there, problem = _wanted_shapes(state), {}, None
    architecture, written = _architecture(modules), {}
    try:
        written = (dist_checkpointing.load_content_metadata(str(folder)) or {})["architecture"]
        there = {
            item.key: item.global_shape
            for item in dist_checkpointing.load_tensors_metadata(str(folder)).values()
        }
    except (Exception, CheckpointException) as error:  # an unpickled index that is damaged may raise anything
        problem = _one_line(error)
        if (
            COMMON_STATE_FILE
            and (folder / ".metadata").exists()
            and not (folder / COMMON_STATE_FILE).exists()
        ):
            problem = f"it has no {COMMON_STATE_FILE}; if Megatron-Core 0.19 or later wrote it, only such a release can read it"
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (problem, here))
    if unreadable := {rank: text for rank, (text, _) in enumerate(gathered) if text}:
        raise UserError(
            f"checkpoint {folder} cannot be read: {_by_rank(unreadable)}; use another one, on a disk that all nodes share"
        )
    wanted = {key: shape for _, shapes in gathered for key, shape in shapes.items()}
    different = [
        f"{name} is {written.get(name)} there and {value} here"
        for name, value in architecture.items()
        if written.get(name) != value
    ]
    different += [
        f"{key} is {tuple(there[key])} there and {shape} here"
        for key, (shape, padded) in wanted.items()
        if key in there and tuple(there[key])[padded:] != shape[padded:]
    ]
    surplus = {
        key
        for key in there.keys() - wanted.keys()
        if "optimizer" in state or not key.startswith("optimizer.")
    }
    if absent := wanted.keys() - there.keys():
        different.append(f"it lacks {listing(absent, limit=3)}")
    if surplus:
        different.append(f"this model has no {listing(surplus, limit=3)}")
    if different:
        more = f"; and {len(different) - 5} more differences" if len(different) > 5 else ""
        raise UserError(f"checkpoint {folder} does not fit this run: {'; '.join(different[:5])}{more}")


def _wanted_shapes(state: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Global shape of each tensor of this rank, and whether its first dimension is a padded vocabulary, which may differ."""
    shapes = {}
    for value in nested_values(state):
        for item in nested_values([value.build()]) if isinstance(value, ShardedTensorFactory) else [value]:
            if isinstance(item, ShardedTensor):
                shapes[item.key] = (tuple(item.global_shape), bool(item.allow_shape_mismatch))
    return shapes


# --- the writer process ------------------------------------------------------------------------------------------------------


def _fork_writer(folder: Path, request: AsyncRequest) -> _Pending:
    if request.async_fn is not None:
        request = request._replace(async_fn=partial(_write, request.async_fn))
    caller, problem = TemporalAsyncCaller(), None
    try:
        caller.schedule_async_call(request)
    except OSError as error:  # of this rank alone: the others learn of it in `finished`
        problem = f"no writer could be started: {error}"
    # The finalizers are all that is needed of the request; its arguments hold tensors.
    request = request._replace(async_fn=None, async_fn_args=(), preload_fn=None)
    return _Pending(folder, request, caller, caller.process, problem)


def _write(write: Any, *arguments: Any) -> None:
    """What a rank's writer process runs."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches a terminal's every process; what stops then is the driver's to say
    signal.signal(signal.SIGCHLD, _end_with_child)
    write(*arguments)


def _end_with_child(signum: int, frame: FrameType | None) -> None:
    """End this writer as its child ended, if that was not well: Megatron-Core 0.16 would wait forever for a killed one."""
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if code := os.waitstatus_to_exitcode(ended[1]):
                for child in active_children():
                    child.kill()
                if code < 0:
                    os.kill(os.getpid(), -code)
                os._exit(code)


def _end_of(process: BaseProcess | None) -> str | None:
    """How a writer that is gone ended, unless well."""
    if process is None or process.exitcode == 0:
        return None
    if process.exitcode is not None and process.exitcode < 0:
        return f"its writer was killed by {signal.Signals(-process.exitcode).name} (out of memory?)"
    return f"its writer ended with exit code {process.exitcode}; its output says why"


# --- what goes wrong ---------------------------------------------------------------------------------------------------------


def _obstacle(folder: Path) -> dict[int, str]:
    """Why this rank could not write into the folder. Looked at before, for rank 0 writes alone where others wait for it."""
    rank = dist.get_rank()
    if not folder.is_dir():
        return {rank: "there is no such folder (run_dir must be on a disk that all nodes share)"}
    try:
        if rank == 0:
            with tempfile.TemporaryFile(dir=folder) as file:
                os.posix_fallocate(file.fileno(), 0, ROOM_BYTES)
    except OSError as error:
        return {rank: str(error.strerror)}
    return {}


def _raise_together(folder: Path, problems: dict[int, str]) -> None:
    """UserError on every rank if any knows of a problem, by rank; a rank knows best about itself. One gather."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, problems)
    known = {rank: text for found in gathered for rank, text in found.items()}
    known.update((rank, found[rank]) for rank, found in enumerate(gathered) if rank in found)
    if known:
        raise _refusal(folder, _by_rank(known))


def _refusal(folder: Path, reason: str) -> UserError:
    free = f" ({shutil.disk_usage(folder).free // 2**20} MiB free)" if folder.is_dir() else ""
    return UserError(
        f"cannot write the checkpoint {folder}{free}: {reason}; mend this, then run the same command to go on from the "
        "checkpoint before"
    )


def _reasons(error: CheckpointException) -> dict[int, str]:
    """By rank. Where Megatron saves, only rank 0 is told."""
    return {rank: _one_line(reason) for rank, (reason, _) in error.failures.items()}


def _by_rank(reasons: dict[int, str], limit: int = 3) -> str:
    more = f" and {len(reasons) - limit} more ranks" if len(reasons) > limit else ""
    return "; ".join(f"rank {rank}: {reasons[rank]}" for rank in sorted(reasons)[:limit]) + more


def _one_line(error: BaseException) -> str:
    if isinstance(error, CheckpointException):  # its own text is a traceback
        error = next((reason for reason, _ in error.failures.values()), error)
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
