"""Engines in this process with the handles of Ray actors: calls return references; arguments and errors are passed as by Ray."""

import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import ray


class Stored:
    """What `ray.put` gives here: a pickled value, its large parts out of band and read-only, as in Ray's object store."""

    def __init__(self, value: Any) -> None:
        buffers: list[pickle.PickleBuffer] = []
        self.pickled = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        self.buffers = [bytes(buffer.raw()) for buffer in buffers]

    def value(self) -> Any:
        return pickle.loads(self.pickled, buffers=self.buffers)


class Reference:
    def __init__(self, future: Future) -> None:
        self._future = future

    def future(self) -> Future:
        return self._future


class Handle:
    """An engine as an actor with several threads. What a method raises arrives as Ray's error around it, unless it is Ray's own."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.threads = ThreadPoolExecutor(4)

    def __getattr__(self, method: str) -> Any:
        return Method(lambda *args: Reference(self.threads.submit(self._run, method, args)))

    def _run(self, method: str, args: tuple) -> Any:
        try:
            return getattr(self.engine, method)(
                *(arg.value() if isinstance(arg, Stored) else arg for arg in args)
            )
        except ray.exceptions.RayError:
            raise
        except Exception as error:
            raise ray.exceptions.RayTaskError(method, "", error).as_instanceof_cause() from None


class Method:
    def __init__(self, remote: Callable[..., Reference]) -> None:
        self.remote = remote


@contextmanager
def handles(*engines: Any) -> Iterator[dict[int, Handle]]:
    """Handles by number; their threads are gone afterwards (later tests of this process may fork)."""
    found = {number: Handle(engine) for number, engine in enumerate(engines)}
    try:
        yield found
    finally:
        for handle in found.values():
            handle.threads.shutdown()
