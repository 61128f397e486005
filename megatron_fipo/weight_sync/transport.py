"""The interface of weight transports, and the rule that chooses one. Imports no torch: the driver reads it too.

A transport is made on every trainer rank and used for all pushes of a run. `object_store.py` serves every engine,
`nccl.py` engines on vLLM with GPUs of their own. docs/weight-sync.md has the complete path and its costs.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Protocol

BUCKETS_IN_STORE = 3
"""Buckets in the object store at one time: one that the engines take, the next, and one that an engine may still hold
because it contains a part of a layer."""


class Transport(StrEnum):
    """How weights get to the engines, in words for the user."""

    OBJECT_STORE = "Ray's object store"
    NCCL = "NCCL"


def transport_for(engine: str, device: str, colocated: bool) -> Transport:
    """The transport for `rollout.engine`, the trainer's device type, and whether engines share its GPUs.

    NCCL accepts no communicator with two ranks on one GPU, so colocated engines use the object store; `local` engines use
    it because they are for small models.
    """
    return (
        Transport.NCCL if (engine, device, colocated) == ("vllm", "cuda", False) else Transport.OBJECT_STORE
    )


class WeightSyncError(RuntimeError):
    """An engine did not take the weights. `engine` is its number, which the message names."""

    def __init__(self, engine: int, reason: str) -> None:
        super().__init__(f"rollout engine {engine} {reason}")
        self.engine = engine
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.engine, self.reason)


class WeightTransport(Protocol):
    """Sends the trainer's weights to engines. Every method is called on all trainer ranks together."""

    def push(self, engines: Mapping[int, Any], version: int, *, timeout_s: float, check: bool) -> None:
        """Give every engine (actor handle by number) the current weights and `version`.

        Collective: exporting gathers the shards, rank 0 sends. With `check`, return only once all engines hold exactly
        what was sent. Raises `WeightSyncError` on rank 0 if an engine dies, is late or differs.
        """

    def close(self) -> None:
        """Release what is kept between pushes."""
