"""New weights from the trainer into the engines, in place, with a version number and a checksum that both sides compare."""

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ray
import torch
from torch import Tensor

from megatron_fipo.errors import UserError

BUCKETS_IN_FLIGHT = 2
"""Buckets that lie in the object store at one time: one being read by the engines, one being written."""


class WeightSyncError(RuntimeError):
    """An engine did not take the weights. `engine` is its number, which the message names."""

    def __init__(self, engine: int, reason: str) -> None:
        super().__init__(f"rollout engine {engine} {reason}")
        self.engine = engine
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.engine, self.reason)


class WeightChecksum:
    """A fingerprint of named tensors that depends on neither their order nor how they were bucketed.

    Each tensor gives a sha256 over name, dtype, shape and bytes; the fingerprint is the sum of these numbers modulo 2^256.
    Memory: one CPU copy of the tensor at hand, none where it already is a contiguous CPU tensor.
    """

    def __init__(self) -> None:
        self._sum = 0

    def add(self, name: str, tensor: Tensor) -> None:
        digest = hashlib.sha256(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._sum = (self._sum + int.from_bytes(digest.digest(), "big")) % 2**256

    def hexdigest(self) -> str:
        return f"{self._sum:064x}"


def push_weights(
    tensors: Iterable[tuple[str, Tensor | None]], engines: Mapping[int, Any], version: int, bucket_bytes: int, timeout_s: float
) -> None:
    """Give every engine the tensors and `version`; return once all of them hold exactly what was sent.

    Called on every trainer rank: making `tensors` is collective (export gathers the shards), so all ranks exhaust it in the same
    order. Rank 0 gets tensors and sends them to `engines` (actor handles by number); the others get `None` and send nothing.
    Rank 0 exhausts the iterator after a failure too, and raises then, so that no rank is left waiting in a collective.

    Each bucket goes to the object store once and is read there by all engines of the node. At most `BUCKETS_IN_FLIGHT` buckets
    are unacknowledged, so memory is bounded by a few times `bucket_bytes` (or the largest tensor, if that is larger).

    Raises `WeightSyncError` where an engine dies, takes longer than `timeout_s` for the whole update, or ends up with other
    bytes than were sent; `UserError` where the engine's model has other names or shapes.
    """
    checksum = WeightChecksum()
    transfer: _Transfer | None = None
    failure: Exception | None = None
    for bucket in _buckets(tensors, bucket_bytes):
        if failure is not None:
            continue
        try:
            if transfer is None:
                transfer = _Transfer(engines, timeout_s)
            for name, tensor in bucket.items():
                checksum.add(name, tensor)
            transfer.send(bucket)
        except (WeightSyncError, UserError) as error:
            failure = error
    if failure is not None:
        raise failure
    if transfer is not None:
        transfer.finish(version, checksum.hexdigest())


class _Transfer:
    """One update in progress, seen from rank 0. Calls to an actor run in the order sent, so only acknowledgements are awaited."""

    def __init__(self, engines: Mapping[int, Any], timeout_s: float) -> None:
        self._engines = engines
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._unacknowledged: list[dict[int, Any]] = []
        self._await({number: engine.begin_weight_update.remote() for number, engine in engines.items()})

    def send(self, bucket: dict[str, Tensor]) -> None:
        while len(self._unacknowledged) >= BUCKETS_IN_FLIGHT:
            self._await(self._unacknowledged.pop(0))
        reference = ray.put(bucket)
        self._unacknowledged.append({number: engine.load_weights.remote(reference) for number, engine in self._engines.items()})

    def finish(self, version: int, expected: str) -> None:
        while self._unacknowledged:
            self._await(self._unacknowledged.pop(0))
        checksums = self._await({number: engine.finish_weight_update.remote(version) for number, engine in self._engines.items()})
        for number, checksum in checksums.items():
            if checksum != expected:
                raise WeightSyncError(
                    number,
                    f"holds other weights than were sent for version {version} (checksum {checksum[:12]}, sent {expected[:12]})",
                )

    def _await(self, references: Mapping[int, Any]) -> dict[int, Any]:
        """The result of one call per engine, or the error of the first engine that gave none."""
        results = {}
        for number, reference in references.items():
            try:
                results[number] = ray.get(reference, timeout=max(0.0, self._deadline - time.monotonic()))
            except ray.exceptions.GetTimeoutError:
                reason = f"did not take the weights within rollout.timeout_s = {self._timeout_s:g} s"
                raise WeightSyncError(number, reason) from None
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, UserError):
                    raise error.cause from None
                raise WeightSyncError(number, f"failed while taking the weights: {error.cause!r}") from error
            except ray.exceptions.RayError as error:
                raise WeightSyncError(number, f"died while taking the weights ({type(error).__name__})") from error
        return results


def _buckets(tensors: Iterable[tuple[str, Tensor | None]], bucket_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Group CPU copies of the tensors into buckets of at most `bucket_bytes` (a larger tensor goes alone)."""
    bucket: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if tensor is None:
            continue
        if bucket and size + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket, size = {}, 0
        # A fresh tensor: pickling a view would send its whole storage, and the exporter may use its buffer again.
        bucket[name] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
        size += tensor.nbytes
    if bucket:
        yield bucket
