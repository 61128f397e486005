"""Checks in child processes: one that hangs is killed, one that crashes is a result, and this process touches nothing."""

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self

END_S = 5.0
"""Seconds in which a killed process is waited for."""


def result_printer() -> Callable[[Any], None]:
    """In a check: the function that prints a result. All other output, for example of NCCL, goes to standard error."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return lambda value: print(json.dumps(value), file=results, flush=True)


class Check:
    """`python -m MODULE ARGUMENTS...`. Each line of its output is a JSON value. As a context it ends with the block."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)

    def results(self, deadline: float) -> tuple[list[Any], str | None]:
        """What it has printed until it ended or until `deadline` (of `time.monotonic`), and why it did not end well."""
        output, errors, ended = self._read(deadline)
        lines = output.decode(errors="replace").splitlines(keepends=True)
        values = [json.loads(line) for line in lines if line.endswith("\n")]
        if not ended:
            return values, "it did not end in time"
        code = self._process.wait()
        if code == 0:
            return values, None
        reason = errors.decode(errors="replace").strip().splitlines()
        return values, reason[-1] if reason else f"it ended with exit code {code}"

    def _read(self, deadline: float) -> tuple[bytes, bytes, bool]:
        """Output and errors, and whether the process has closed them. A process that has not is killed, and not waited
        for: one that waits for a dead file system ends only when that answers."""
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        pipes = {self._process.stdout.fileno(): b"", self._process.stderr.fileno(): b""}
        output, errors = pipes
        with selectors.DefaultSelector() as selector:
            for pipe in pipes:
                selector.register(pipe, selectors.EVENT_READ)
            while selector.get_map():
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    self._process.kill()
                    return pipes[output], pipes[errors], False
                for key, _ in ready:
                    part = os.read(key.fd, 65_536)
                    pipes[key.fd] += part
                    if not part:
                        selector.unregister(key.fd)
        return pipes[output], pipes[errors], True
