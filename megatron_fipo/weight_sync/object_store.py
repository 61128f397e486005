"""Weights from the trainer into the engines through Ray's object store, with a version and checksums on both sides.

Serves every engine. Engines on vLLM with GPUs of their own use NCCL instead (`nccl.py`). docs/weight-sync.md has the
complete path, its costs and what was left out.
"""

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from megatron_fipo import progress
from megatron_fipo.errors import UserError
from megatron_fipo.weight_sync.checksum import as_bytes, tensor_checksum
from megatron_fipo.weight_sync.transport import WeightSyncError

CHECKSUM_THREADS = min(4, os.cpu_count() or 1)
"""One thread reads about 6 GB/s."""
WAIT_S = 1.0
"""Seconds between two signs of progress while the engines have time left."""


class ObjectStoreTransport:
    """`WeightTransport` through Ray's object store. `export` makes the tensors, as `push_weights` takes them."""

    def __init__(self, export: Callable[[], Iterable[tuple[str, Tensor | None]]], bucket_bytes: int) -> None:
        self._export = export
        self._bucket_bytes = bucket_bytes

    def push(self, engines: Mapping[int, Any], version: int, *, timeout_s: float, check: bool) -> None:
        push_weights(
            self._export(),
            engines,
            version,
            bucket_bytes=self._bucket_bytes,
            timeout_s=timeout_s,
            check=check,
        )

    def close(self) -> None: ...


def push_weights(
    tensors: Iterable[tuple[str, Tensor | None]],
    engines: Mapping[int, Any],
    version: int,
    *,
    bucket_bytes: int,
    timeout_s: float,
    check: bool,
) -> None:
    """Give every engine the tensors and `version`. With `check`, return only once all of them hold exactly what was sent.

    Called on every trainer rank: making `tensors` is collective (export gathers the shards), so all ranks exhaust it in
    the same order. Rank 0 gets tensors and sends them to `engines` (actor handles by number); the others get `None` and
    send nothing. After a failure rank 0 also exhausts the iterator, then raises, so that no rank waits in a collective.
    Tensors must keep their values until this returns; they are not copied before they are put into the object store.

    Three things run concurrently on rank 0: this thread gathers a bucket, a second one puts the previous bucket into the
    object store and sends it, and more threads compute the checksums of that bucket while the engines take it. Each
    bucket is put once and read in place by all engines of a node. Memory on rank 0: two buckets on the heap (none on a
    CPU, where tensors are the parameters) and `BUCKETS_IN_STORE` in the object store; a tensor larger than
    `bucket_bytes` is a bucket alone.

    Raises `WeightSyncError` if an engine dies, is not done `timeout_s` after the first bucket was ready, or (with
    `check`) holds other bytes than were sent, naming the first such tensor; `UserError` if the engine's model has other
    names or shapes.
    """
    update: _Update | None = None
    failure: Exception | None = None
    for bucket in _buckets(tensors, bucket_bytes):
        if failure is not None:
            continue
        try:
            update = update or _Update(engines, timeout_s, check)
            update.send(bucket)
        except Exception as error:
            failure = error
    try:
        if failure is not None:
            raise failure
        if update is not None:
            update.finish(version)
    finally:
        if update is not None:
            update.close()


class EngineCalls:
    """Calls of all engines at once, under one deadline for the complete update."""

    def __init__(self, engines: Mapping[int, Any], timeout_s: float) -> None:
        self.engines = dict(engines)
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s

    def start(self, method: str, *args: Any) -> dict[int, Future]:
        """Call a method of every engine; results by engine number."""
        return {
            number: getattr(engine, method).remote(*args).future() for number, engine in self.engines.items()
        }

    def wait(self, calls: Mapping[int, Future]) -> dict[int, Any]:
        """All results. Raises the error of the first engine that failed or was not done at the deadline."""
        waiting = {call: number for number, call in calls.items()}
        results = {}
        while waiting:
            progress.advance()
            left = max(0.0, self._deadline - time.monotonic())
            done, _ = wait(waiting, timeout=min(left, WAIT_S), return_when=FIRST_COMPLETED)
            if not done and left <= WAIT_S:
                number, *others = waiting.values()
                also = f", nor did {', '.join(map(str, others))}" if others else ""
                raise WeightSyncError(
                    number, f"did not take the weights within rollout.timeout_s = {self._timeout_s:g} s{also}"
                )
            for call in done:
                number = waiting.pop(call)
                results[number] = _result(number, call)
        return results

    def finish(self, version: int, sent: Mapping[str, str] | None) -> None:
        """End the update on every engine and compare its checksums with those `sent` (None: without a check)."""
        received = self.wait(self.start("finish_weight_update", version))
        for number, checksums in received.items():
            difference = None if sent is None else first_difference(sent, checksums)
            if difference is not None:
                raise WeightSyncError(
                    number, f"holds other weights than were sent for version {version}: {difference}"
                )


def first_difference(sent: Mapping[str, str], received: Mapping[str, str]) -> str | None:
    """The first tensor, in the order sent, whose checksum differs or which only one side has, and the difference."""
    for name, checksum in sent.items():
        if name not in received:
            return f"{name} is missing"
        if received[name] != checksum:
            return f"{name} differs"
    return next((f"{name} was not sent" for name in received if name not in sent), None)


class _Update:
    """One update through the object store, on rank 0. Only the sending thread calls the engines until `finish`."""

    def __init__(self, engines: Mapping[int, Any], timeout_s: float, check: bool) -> None:
        self._calls = EngineCalls(engines, timeout_s)
        self._check = check
        self._checksums: dict[str, Future[str]] = {}
        self._sender = ThreadPoolExecutor(1, "weight-sender")
        self._readers = ThreadPoolExecutor(CHECKSUM_THREADS, "weight-checksum")
        self._taking: dict[int, Future] = {}
        self._pending: list[Future] = [self._sender.submit(self._begin)]

    def send(self, bucket: dict[str, Tensor]) -> None:
        """Pass a bucket on, once the previous one is sent to the engines and its checksums are known."""
        for work in self._pending:
            work.result()
        self._pending = [self._sender.submit(self._send, bucket)]
        if self._check:
            checksums = {
                name: self._readers.submit(tensor_checksum, name, tensor) for name, tensor in bucket.items()
            }
            self._checksums |= checksums
            self._pending += checksums.values()

    def finish(self, version: int) -> None:
        for work in self._pending:
            work.result()
        self._calls.wait(self._taking)
        sent = (
            {name: checksum.result() for name, checksum in self._checksums.items()} if self._check else None
        )
        self._calls.finish(version, sent)

    def close(self) -> None:
        self._sender.shutdown()
        self._readers.shutdown()

    def _begin(self) -> None:
        self._calls.wait(self._calls.start("begin_weight_update", self._check))

    def _send(self, bucket: dict[str, Tensor]) -> None:
        """An engine gets one bucket at a time, since calls to an actor with several threads may be reordered."""
        reference = ray.put(Bucket(bucket))
        self._calls.wait(self._taking)
        self._taking = self._calls.start("load_weights", reference)


class Bucket(dict[str, Tensor]):
    """Named CPU tensors. Pickled, their bytes go out of band: one copy into the object store, none out of it.

    Ray pickles a plain tensor through `torch.save`, with several copies on either side. The receiver gets a plain dict of
    tensors that are views of the read-only object store: an engine must copy them and not write to them.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (
            [(name, tensor.dtype, tuple(tensor.shape), _as_bytes(tensor)) for name, tensor in self.items()],
        )


def _restore(parts: Sequence[tuple[str, torch.dtype, tuple[int, ...], np.ndarray]]) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return {name: torch.from_numpy(data).view(dtype).reshape(shape) for name, dtype, shape, data in parts}


def _as_bytes(tensor: Tensor) -> np.ndarray:
    """The tensor's bytes as uint8 [n]; a view if it is a contiguous CPU tensor."""
    return as_bytes(tensor.detach().cpu().contiguous()).numpy()


def _buckets(tensors: Iterable[tuple[str, Tensor | None]], bucket_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Group the tensors into buckets of at most `bucket_bytes` (a larger tensor is one alone)."""
    bucket: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if tensor is None:
            continue
        if bucket and size + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket, size = {}, 0
        bucket[name] = tensor
        size += tensor.nbytes
    if bucket:
        yield bucket


def _result(number: int, call: Future) -> Any:
    try:
        return call.result()
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise WeightSyncError(number, f"failed while taking the weights: {error.cause!r}") from error
    except ray.exceptions.RayError as error:
        raise WeightSyncError(number, f"died while taking the weights ({type(error).__name__})") from error
