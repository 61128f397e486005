"""The store on the head through which nodes announce themselves and hand over what they measured. Values are JSON."""

import json
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from megatron_fipo.errors import UserError, one_line
from megatron_fipo.node.preflight.allocation import Allocation

POLL_S = 0.05


class Store:
    """A `torch.distributed.TCPStore`; the head serves it on the address by which the others reach it."""

    def __init__(self, allocation: Allocation, timeout_s: float) -> None:
        """Serve or connect, within `timeout_s`. Raises `UserError` if the head cannot be reached."""
        # torch warns on standard error if it finds no host name for an address, which the store does not need, and prints
        # its C++ frames before it raises the error that is reported below.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
        from torch.distributed import TCPStore

        head = allocation.names[0]
        listener = _listen(allocation) if allocation.rank == 0 else None
        try:
            self._store = TCPStore(
                allocation.address,
                listener.getsockname()[1] if listener else allocation.port,
                is_master=listener is not None,
                wait_for_workers=False,
                timeout=timedelta(seconds=timeout_s),
                master_listen_fd=listener.detach() if listener else None,
            )
        except RuntimeError as error:  # torch's DistError is one
            raise UserError(
                f"node {allocation.name} cannot reach the head {head} at {allocation.address}:{allocation.port} in "
                f"{timeout_s:g} s; is the preflight running there, and may the nodes connect to this port?"
            ) from error
        self.port: int = self._store.port

    def put(self, key: str, value: Any) -> None:
        """Store a value; it has arrived on return. Raises `UserError` if the head's store is gone."""
        with _head_answers():
            self._store.set(key, json.dumps(value))
            self._store.check([key])  # the answer to it comes after the value

    def get(self, key: str, deadline: float) -> Any:
        """The value of a key as soon as there is one; None if there is none at `deadline` (of `time.monotonic`)."""
        return self.gather([key], deadline).get(key)

    def gather(self, keys: Iterable[str], deadline: float) -> dict[str, Any]:
        """The values of those keys that have one at `deadline`; returns as soon as all have.

        Raises `UserError` if the head's store is gone.
        """
        found: dict[str, Any] = {}
        missing = list(keys)
        with _head_answers():
            while missing:
                for key in [key for key in missing if self._store.check([key])]:
                    found[key] = json.loads(self._store.get(key))
                    missing.remove(key)
                if time.monotonic() >= deadline:
                    break
                if missing:
                    time.sleep(POLL_S)
        return found


@contextmanager
def _head_answers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise UserError(
            f"the head ended the preflight before this node had finished ({one_line(error)}); read its output"
        ) from error


def _listen(allocation: Allocation) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(
            allocation.address, allocation.port, type=socket.SOCK_STREAM
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        raise UserError(
            f"the head {allocation.name} cannot listen on {allocation.address}:{allocation.port} "
            f"({error.strerror or error}); choose another address or port by --head HOST:PORT"
        ) from error
    return listener
