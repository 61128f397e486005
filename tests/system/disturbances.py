"""Something that happens once to a run in this process: a signal to one of its processes, or to itself, in a phase."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.system.runs import iterations

Condition = Callable[[], list[psutil.Process]]
"""The processes that the signal may go to; empty as long as the moment has not come."""
POLL_S = 0.004


def titled(start: str) -> list[psutil.Process]:
    """Processes of this process's clusters, by the title that Ray gives them: `ray::Class.method` while it runs."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.cmdline()[:1] and process.cmdline()[0].startswith(start):
                found.append(process)
    return found


def ranks_in(method: str) -> list[psutil.Process]:
    return titled(f"ray::RankActor.{method}")


def idle_ranks() -> list[psutil.Process]:
    return [] if titled("ray::RankActor.") else titled("ray::RankActor")


def writers() -> list[psutil.Process]:
    """Checkpoint writers: processes that ranks forked."""
    ranks = titled("ray::RankActor")
    pids = {process.pid for process in ranks}
    found = []
    for process in ranks:
        with suppress(psutil.Error):
            if process.ppid() in pids:
                found.append(process)
    return found


def myself_if(condition: Callable[[], bool]) -> list[psutil.Process]:
    return [psutil.Process()] if condition() else []


def trained(run_dir: Path, count: int) -> bool:
    return (run_dir / "metrics.jsonl").exists() and len(iterations(run_dir)) >= count


class Disturbance:
    """What `disturbing` did."""

    def __init__(self) -> None:
        self.times: list[float] = []
        """`time.time()` of each signal."""


@contextmanager
def disturbing(number: signal.Signals, victims: Condition, times: int = 1) -> Iterator[Disturbance]:
    """While the context is open, send `number` to one of the `victims` as soon as there are any, `times` in all."""
    done, ended = Disturbance(), threading.Event()

    def watch() -> None:
        while len(done.times) < times and not ended.is_set():
            time.sleep(POLL_S)
            if found := victims():
                with suppress(psutil.NoSuchProcess, ProcessLookupError):
                    os.kill(found[-1].pid, number)
                    done.times.append(time.time())
                    if times > 1:
                        psutil.wait_procs(found[-1:], timeout=30)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield done
    finally:
        ended.set()
        thread.join()
