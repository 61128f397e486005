"""One trainer rank as a Ray actor, how to call it, and the errors that end it."""

import gc
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle

from megatron_fipo import progress
from megatron_fipo.errors import LostError, UserError, first_line
from megatron_fipo.trainer.protocol import TrainerRank

Result = TypeVar("Result")
HEARTBEATS = "heartbeats"
"""Ray's concurrency group for `RankActor.beat`: a thread of its own, which answers while a method runs."""


class TrainerLostError(LostError):
    """A rank died, hangs or lost the others, and all ranks ended with it: what they trained since the last save is gone."""


class TrainerRefusedError(UserError):
    """A rank raised a `UserError`, and all ranks ended with it."""


class TrainerBugError(Exception):
    """A rank raised another exception, its `__cause__`, and all ranks ended with it."""


class RankActor:
    """The Ray actor of one rank. Imports the worker on the rank: the driver never imports Megatron-Core.

    The worker runs in one thread of Python's. Beside heartbeats Ray runs methods in a thread of C++, from which Python 3.11
    cannot fork a process that forks others, as checkpoint writers do.
    """

    _worker: TrainerRank

    def __init__(self) -> None:
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        threading.Thread(target=self._serve, name="rank", daemon=True).start()

    def start(self, load_worker: Callable[[], type[TrainerRank]], **arguments: Any) -> str:
        """Make the worker; returns its node's address. Not in `__init__`, whose exceptions reach the driver only as text."""
        self._run(lambda: self._start(load_worker, arguments))
        return ray.util.get_node_ip_address()

    def call(self, method: str, *arguments: Any, **keywords: Any) -> Any:
        """Run a method of the worker, by the name that `TrainerGroup.call` takes from the rank's protocol."""
        try:
            return self._run(lambda: getattr(self._worker, method)(*arguments, **keywords))
        except Exception as error:
            from megatron_fipo.trainer.failures import run_error  # imports torch

            if (known := run_error(error)) is None:
                raise
            raise known from error

    def beat(self) -> int:
        """How much work the rank has done, while it works."""
        return progress.count()

    def _start(self, load_worker: Callable[[], type[TrainerRank]], arguments: dict[str, Any]) -> None:
        self._worker = load_worker()(**arguments)
        # The objects of the imported modules stay. Else every collection looks through them, for example several
        # times while a rank reads its share of a batch.
        gc.collect()
        gc.freeze()

    def _run(self, task: Callable[[], Result]) -> Result:
        result: Future[Result] = Future()
        self._tasks.put((result, task))
        return result.result()

    def _serve(self) -> None:
        while True:
            result, task = self._tasks.get()
            try:
                result.set_result(task())
            except BaseException as error:
                result.set_exception(error)
            del result, task  # until the next task they would keep arguments and results


def start_actor(**options: Any) -> ActorHandle:
    """Start the actor of a rank with Ray's `options`."""
    remote: Any = ray.remote
    return remote(concurrency_groups={HEARTBEATS: 1})(RankActor).options(**options).remote()


def submit(actor: ActorHandle, method: str, *arguments: Any, **keywords: Any) -> ray.ObjectRef:
    """Start a call. Its name shows the method instead of `call` in process titles and Ray's messages."""
    return actor.call.options(name=f"{RankActor.__name__}.{method}").remote(method, *arguments, **keywords)


def beat(actor: ActorHandle) -> ray.ObjectRef:
    """Ask for a heartbeat."""
    return actor.beat.options(concurrency_group=HEARTBEATS).remote()


def raised(rank: int, method: str, error: ray.exceptions.RayTaskError) -> Exception:
    """What a method that raised means for the run."""
    cause = error.cause
    if isinstance(cause, LostError):
        return TrainerLostError(f"trainer rank {rank} failed in {method}: {cause}")
    if isinstance(cause, UserError):
        return TrainerRefusedError(str(cause))
    return TrainerBugError(
        f"trainer rank {rank} failed in {method}: {type(cause).__name__}: {first_line(cause)}"
    )
