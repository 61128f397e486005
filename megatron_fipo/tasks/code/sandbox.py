"""The scorer's side of the sandbox: starts its main process, sends it one test at a time, and starts it again if it is lost."""

import contextlib
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fipo.errors import UserError
from megatron_fipo.tasks.code.child.frames import receive, send
from megatron_fipo.tasks.code.child.lockdown import supported

FOLDER = Path(__file__).parent / "child"
ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "PYTHONUTF8": "1",
}
"""All of it: nothing of the scorer's own."""
PROBE = """
import os, socket
for name, action in (
    ("open files", lambda: os.open("/", os.O_RDONLY)),
    ("start processes", os.fork),
    ("use the network", lambda: socket.socket()),
    ("send signals", lambda: os.kill(os.getppid(), 0)),
):
    try:
        action()
    except PermissionError:
        continue
    print(name)
"""
"""Prints what a process can do that it must not."""


@dataclass(frozen=True)
class Limits:
    """Of one test."""

    cpu_s: float
    wall_s: float
    memory_mb: int
    output_bytes: int
    """Of the expected output; somewhat more is taken."""


@dataclass(frozen=True)
class Run:
    """What an answer did with one input."""

    end: str
    """`finished`, `failed` (it raised, was killed, or ended with a status), `time` or `output` (too much of it)."""
    output: bytes
    """Empty unless it finished."""
    seconds: float
    """Of processor time."""


class Sandbox:
    """Runs answers, one at a time. Its process is started by the first call and ends with this one."""

    def __init__(self, modules: Sequence[str]) -> None:
        """`modules` are those that answers may import besides the standard library."""
        self._modules = list(modules)
        self._connection: socket.socket | None = None
        self._process: subprocess.Popen | None = None

    def check(self) -> None:
        """Start it, and raise `UserError` if this machine cannot confine answers."""
        fault = (
            "there is no filter of system calls for its system and processor"
            if not supported()
            else self._fault()
        )
        if fault is not None:
            self.close()
            raise UserError(
                f"the reward `code` cannot confine answers on this machine: {fault}; it needs Linux on x86_64 or aarch64, in a "
                "container one that permits seccomp filters"
            )

    def run(self, source: str, call: dict[str, Any] | None, given: bytes, limits: Limits) -> Run:
        """Run a program with `given` as its standard input, or call a function of it: `{"function": name}` with the JSON list
        `given` of arguments, or `{"expression": text}`; the output is then the value as JSON (`values.plain`).

        Raises OSError or EOFError if the sandbox is lost; the next call starts another.
        """
        request = {
            "source": source,
            "call": call,
            "cpu_s": limits.cpu_s,
            "wall_s": limits.wall_s,
            "memory_mb": limits.memory_mb,
            "output_bytes": limits.output_bytes,
        }
        try:
            connection = self._connection or self._start()
            send(connection, request, given)
            answer, output = receive(connection)
        except BaseException:
            self.close()  # also at a time limit of the caller: the next request would read the answer to this one
            raise
        return Run(answer["end"], output, answer["seconds"])

    @property
    def process_id(self) -> int | None:
        """Of its main process; None if none runs."""
        return None if self._process is None else self._process.pid

    def close(self) -> None:
        """End its process, and with it the answer that runs."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._connection = self._process = None

    def _start(self) -> socket.socket:
        own, other = socket.socketpair()
        self._connection = own
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(FOLDER)],
                stdin=other.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=ENVIRONMENT,
                cwd="/",
                start_new_session=True,
            )
        send(own, {"modules": self._modules})
        receive(own)
        return own

    def _fault(self) -> str | None:
        with contextlib.suppress(OSError, EOFError):
            run = self.run(PROBE, None, b"", Limits(10.0, 60.0, 256, 0))
            if run.end != "finished":
                return "the kernel does not accept its limits"
            allowed = ", ".join(run.output.decode().split("\n")[:-1])
            return f"they could {allowed}" if allowed else None
        return "the sandbox's process ends when it starts"
