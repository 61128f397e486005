"""New weights from the trainer's GPUs into engines on vLLM that have GPUs of their own: one NCCL broadcast to all of them.

It uses vLLM's own interface (`vllm.distributed.weight_transfer`, written against version 0.32): vLLM's trainer engine
packs the tensors into buffers and broadcasts them from global rank 0, which is rank 0 of the communicator; vLLM's workers
unpack and load them. This module lists the tensors, calls the engines, gives each worker a separate rank and sets a deadline.

It has not run on several GPUs. The tests drive vLLM's trainer engine with everything but the communicator.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_fipo.errors import UserError
from megatron_fipo.network import free_port, node_address
from megatron_fipo.weight_sync.checksum import Checksums
from megatron_fipo.weight_sync.object_store import EngineCalls
from megatron_fipo.weight_sync.transport import WeightSyncError

if TYPE_CHECKING:
    from megatron_fipo.checkpoint.hf_export import TensorInfo

GRACE_S = 10.0
"""Seconds in which a transfer whose engine failed may still end."""

Export = Callable[[], Iterable[tuple[str, Tensor | None]]]


class TransferStuckError(RuntimeError):
    """A broadcast that cannot end: NCCL waits for a lost engine without a limit, here and in all other engines.

    This process cannot send anything any more. The trainer's ranks and the engines must be killed and restarted.
    """


def rank_offsets(engines: Iterable[int], workers_per_engine: int) -> dict[int, int]:
    """The rank of each engine's first worker. Rank 0 sends, the workers follow engine by engine.

    (vLLM's own client for Ray gives every engine offset 1: with a second engine the rendezvous would never end.)
    """
    return {number: 1 + index * workers_per_engine for index, number in enumerate(sorted(engines))}


class NcclTransport:
    """`WeightTransport` over NCCL. Made on every trainer rank; rank 0 keeps the communicator between pushes."""

    def __init__(
        self,
        export: Export,
        tensors: Sequence["TensorInfo"],
        *,
        rank: int,
        device: torch.device,
        workers_per_engine: int,
        buffer_bytes: int,
    ) -> None:
        """`export` starts a pass of `iterate_hf_tensors(..., to_host=False)`, `tensors` is what it yields, in order."""
        self._source = _Source(export, tensors)
        self._sends = rank == 0
        self._device = device
        self._workers_per_engine = workers_per_engine
        self._buffer_bytes = buffer_bytes
        self._client: _Client | None = None
        self._trainer: Any = None

    def push(self, engines: Mapping[int, Any], version: int, *, timeout_s: float, check: bool) -> None:
        """Give every engine the weights and `version`, with the guarantees of `push_weights` except for a lost engine.

        Collective like the export. Bytes over the network: the complete model once to every engine worker (NCCL's broadcast),
        although a worker's tensor-parallel rank keeps only a part. Memory beyond the export's: two buffers of `buffer_bytes` (or
        the largest tensor) on rank 0's GPU and on each worker's.

        The communicator is made in the first push and again whenever the set of engines changes.

        Raises `WeightSyncError` if an engine failed before or after the broadcast, with the export exhausted on all ranks;
        `TransferStuckError`, naming the engine, if one is lost or late while the broadcast runs. The other ranks are then
        inside a collective of the export, so whoever catches it must kill them all.
        """
        if self._device.type == "cuda":
            torch.cuda.synchronize(
                self._device
            )  # the export reads parameters on other streams than the optimizer wrote them on
        if not self._sends:
            self._source.exhaust()
            return
        self._source.begin_pass(check)
        try:
            self._broadcast(engines, timeout_s, check)
        except (WeightSyncError, UserError):
            self._source.exhaust()
            self.close()
            raise
        assert self._client is not None
        self._client.calls.finish(version, self._source.checksums.finish() if check else None)

    def close(self) -> None:
        """Leave the communicator."""
        if self._trainer is not None:
            self._trainer.shutdown()
        self._trainer, self._client = None, None

    def _broadcast(self, engines: Mapping[int, Any], timeout_s: float, check: bool) -> None:
        """Send in a thread, so that neither a lost engine nor the deadline blocks this one."""
        if self._client is None or self._client.engines != dict(engines):
            self.close()
            self._client = _Client(engines, self._workers_per_engine)
        client = self._client
        client.begin_round(timeout_s, check)
        sending = _in_thread(self._send, client)
        wait((sending, client.failure), timeout=timeout_s + GRACE_S, return_when=FIRST_COMPLETED)
        wait((sending,), timeout=GRACE_S)
        if not sending.done():
            reason = (
                client.failure.exception()
                if client.failure.done()
                else "the engines are done, the trainer's rank 0 is not"
            )
            raise TransferStuckError(
                f"the NCCL broadcast of the weights to rollout engines {', '.join(map(str, client.engines))} cannot end: {reason}; "
                "restart trainer and engines from the last checkpoint"
            )
        sending.result()

    def _send(self, client: "_Client") -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        if self._trainer is None:
            self._trainer = self._join(client)
        self._trainer.send_weights()

    def _join(self, client: "_Client") -> Any:
        """vLLM's trainer engine, its communicator with all workers made."""
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        address = node_address()  # vLLM listens there alone
        init_info = NCCLTrainerInitInfo(
            master_address=address,
            master_port=free_port(address),
            world_size=1 + len(client.engines) * self._workers_per_engine,
            packed=True,
            packed_buffer_size_bytes=self._buffer_bytes,
            rank=0,
        )
        return WeightTransferTrainerFactory.trainer_init(init_info, client=client, source=self._source)


class _Source:
    """vLLM's `WeightSource`: the tensors to send, and before that their names, dtypes and shapes in the same order."""

    def __init__(self, export: Export, tensors: Sequence["TensorInfo"]) -> None:
        self._export = export
        self._tensors = list(tensors)
        self._check = False
        self._pass: Iterator[tuple[str, Tensor | None]] | None = None
        self.checksums = Checksums()
        """Of what was sent in this pass, if it began with the check."""

    def metadata(self) -> list["TensorInfo"]:
        """Attributes `name`, `dtype`, `shape`, as vLLM's `ParamMeta` has them."""
        return self._tensors

    def begin_pass(self, check: bool) -> None:
        self._pass, self._check, self.checksums = None, check, Checksums()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """One pass; with the check, each tensor is read once more on its GPU before it is sent.

        vLLM iterates under two CUDA streams in turn, and one step of the export makes several tensors: what one step
        computed on one stream may be read on the other. So the stream that computed it is synchronized, and `record_stream`
        keeps the allocator from reusing the memory before the stream that reads it is done.
        """
        self._pass = iter(self._export())
        for name, tensor in self._pass:
            assert tensor is not None, "rank 0 gets every tensor"
            if tensor.is_cuda:
                stream = torch.cuda.current_stream(tensor.device)
                stream.synchronize()
                tensor.record_stream(stream)
            if self._check:
                self.checksums.add(name, tensor)
            yield name, tensor

    def exhaust(self) -> None:
        """Finish the pass, or run a complete one if none was begun, so that the other ranks reach the end of the export."""
        for _ in self._pass or self._export():
            pass
        self._pass = None


class _Client:
    """vLLM's `VLLMWeightSyncClient`: the calls that its trainer engine makes, to every engine at once.

    A call that fails on one engine fails for all. `failure` then notifies the thread that watches the transfer, since the
    one that transfers may be waiting for the lost engine inside NCCL.
    """

    def __init__(self, engines: Mapping[int, Any], workers_per_engine: int) -> None:
        self.engines = dict(engines)
        self._offsets = rank_offsets(self.engines, workers_per_engine)

    def begin_round(self, timeout_s: float, check: bool) -> None:
        self._check = check
        self.calls = EngineCalls(self.engines, timeout_s)
        self.failure: Future[None] = Future()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos = {number: {**init_info, "rank_offset": self._offsets[number]} for number in self.engines}
        self._wait(
            {
                number: engine.nccl_init.remote(infos[number]).future()
                for number, engine in self.engines.items()
            }
        )

    def start_weight_update(self) -> None:
        self._wait(self.calls.start("begin_weight_update", self._check))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._wait(self.calls.start("nccl_update", update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Nothing: `NcclTransport.push` ends the update, with its version and the comparison of checksums."""

    def _wait(self, calls: Mapping[int, Future]) -> None:
        try:
            self.calls.wait(calls)
        except (WeightSyncError, UserError) as error:
            self.failure.set_exception(error)
            raise


def _in_thread(function: Callable[..., None], *args: Any) -> Future[None]:
    """Run in a thread that does not keep the process alive, should it hang."""
    result: Future[None] = Future()

    def run() -> None:
        try:
            function(*args)
            result.set_result(None)
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="weight-transfer", daemon=True).start()
    return result
