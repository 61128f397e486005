"""The sockets at which the processes of a run listen, while it runs."""

import contextlib
import os
import socket
import subprocess
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from tests.system.runs import MARK, ROOT, command, marked

LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")
EVERY_S = 0.5


@dataclass(frozen=True)
class Listener:
    """One open socket: TCP that listens, or UDP."""

    address: str
    process: str


def listeners_of(
    *arguments: object, meanwhile: Callable[[], None] = lambda: None, **environment: str
) -> tuple[set[Listener], str]:
    """Run the command to its end. Returns what it and all its descendants listened at, and its output.

    `meanwhile` is called repeatedly while it runs.
    """
    mark = uuid.uuid4().hex
    kept = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    process = subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        env={**kept, **environment, MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    found: set[Listener] = set()
    while process.poll() is None:
        for member in marked(mark):
            with contextlib.suppress(psutil.Error):
                found |= {
                    Listener(connection.laddr.ip, member.name())
                    for connection in member.net_connections("inet")
                    if connection.status == psutil.CONN_LISTEN or connection.type == socket.SOCK_DGRAM
                }
        meanwhile()
        time.sleep(EVERY_S)
    assert process.stdout is not None
    output = process.stdout.read()
    assert process.returncode == 0, output[-6000:]
    return found, output
