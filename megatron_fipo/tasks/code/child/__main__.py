"""The sandbox's main process: loads modules once, then forks a process for each test. Standard input is its connection.

It is started with an empty environment and without other open files, and no name in it keeps an earlier answer or its output,
so that nothing in it is worth reading. It never gets the expected outputs.
"""

import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import sys
import time
import warnings

from answer import run_answer
from frames import receive, send
from lockdown import Lockdown

MAX_OUTPUT_BYTES = 2**20
"""Of an answer, beyond as many as the expected output has."""
NOT_LOADED = (
    "antigravity",
    "this",
    "idlelib",
    "lib2to3",
    "tkinter",
    "turtle",
    "turtledemo",
    "test",
    "venv",
    "ensurepip",
)
"""Modules of the standard library that do something when they are imported, or are large."""
SUBMODULES = (
    "collections.abc",
    "concurrent.futures",
    "encodings.idna",
    "importlib.util",
    "os.path",
    "unittest.mock",
    "_strptime",
)
"""Imported later by modules that are loaded."""


def main() -> None:
    connection = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    header, _ = receive(connection)
    load_modules(header["modules"])
    gc.collect()
    gc.freeze()  # else collections in each answer's process would copy the memory of all modules
    lockdown = Lockdown()
    lockdown.end_with_parent()
    send(connection, {"ready": True})
    while True:
        # No names: each answer finds this frame, as it was when its process was forked.
        send(connection, *run_test(lockdown, *receive(connection)))


def load_modules(names: list[str]) -> None:
    """Import the standard library and these modules, as far as they are there: an answer cannot open their files."""
    sys.dont_write_bytecode = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        standard = sorted(name for name in sys.stdlib_module_names if name not in NOT_LOADED)
        for name in (*standard, *SUBMODULES, *names):
            with contextlib.suppress(Exception, SystemExit):
                module = importlib.import_module(name)
                if name in names:
                    for part in dir(module):  # parts that are loaded when they are used
                        getattr(module, part, None)


def run_test(lockdown: Lockdown, request: dict, body: bytes) -> tuple[dict, bytes]:
    """Run an answer on one input: how it ended (`finished`, `failed`, `time` or `output`), and its output."""
    input_read, input_write = os.pipe()
    output_read, output_write = os.pipe()
    threads = lockdown.thread_limit()
    process = os.fork()
    if process == 0:
        leave = os._exit  # the answer may replace it
        try:
            for number in (signal.SIGINT, signal.SIGPIPE):
                signal.signal(number, signal.SIG_DFL)
            os.chdir("/")
            os.dup2(input_read, 0)
            os.dup2(output_write, 1)
            os.dup2(os.open(os.devnull, os.O_RDWR), 2)
            os.closerange(3, 1024)
            lockdown.apply(
                memory_bytes=request["memory_mb"] * 2**20, cpu_s=int(request["cpu_s"]) + 1, threads=threads
            )
            leave(run_answer(request))
        finally:
            leave(1)
    os.close(input_read)
    os.close(output_write)
    try:
        return exchange(process, input_write, output_read, request, body)
    finally:
        os.close(output_read)


def exchange(
    process: int, to_answer: int, from_answer: int, request: dict, body: bytes
) -> tuple[dict, bytes]:
    """Give a process its input and take its output until it ends, within the limits; end it then. Closes `to_answer`."""
    end, output, position = "", bytearray(), 0
    deadline = time.monotonic() + request["wall_s"]
    os.set_blocking(to_answer, False)
    poll = select.poll()
    poll.register(from_answer, select.POLLIN)
    poll.register(to_answer, select.POLLOUT)
    writing = True
    while not end:
        left = deadline - time.monotonic()
        if left <= 0:
            end = "time"
            break
        events = dict(poll.poll(left * 1000 + 1))
        if writing and to_answer in events:
            try:
                position += os.write(to_answer, body[position : position + 65536])
            except BrokenPipeError:
                position = len(body)
            if position >= len(body):
                poll.unregister(to_answer)
                os.close(to_answer)
                writing = False
        if from_answer in events:
            part = os.read(from_answer, 2**16)
            output += part
            if len(output) > request["output_bytes"] + MAX_OUTPUT_BYTES:
                end = "output"
            elif not part:
                end = "closed"
    if writing:
        os.close(to_answer)
    status, seconds = reap(process, deadline if end == "closed" else 0.0)
    if end == "closed":
        late = status is None or seconds > request["cpu_s"]
        end = "time" if late else "finished" if status == 0 else "failed"
    return {"end": end, "seconds": seconds}, bytes(output) if end == "finished" else b""


def reap(process: int, until: float) -> tuple[int | None, float]:
    """Wait for a process, which is killed at `until`: its exit status (None: killed), and its processor time in seconds."""
    pause = 0.0005
    killed = False
    while True:
        number, status, usage = os.wait4(process, 0 if killed else os.WNOHANG)
        if number:
            return None if killed else status, usage.ru_utime + usage.ru_stime
        if time.monotonic() >= until:
            os.kill(process, signal.SIGKILL)
            killed = True
            continue
        time.sleep(pause)
        pause = min(2 * pause, 0.01)


if __name__ == "__main__":
    with contextlib.suppress(EOFError, OSError):
        main()
