"""Messages between the scorer and the sandbox: an object of JSON and bytes, each after its size."""

import json
import socket
import struct
from typing import Any

_SIZES = struct.Struct("!QQ")


def send(connection: socket.socket, header: dict[str, Any], body: bytes = b"") -> None:
    """Send one message. Raises OSError if the other side is gone."""
    text = json.dumps(header).encode()
    connection.sendall(_SIZES.pack(len(text), len(body)) + text + body)


def receive(connection: socket.socket) -> tuple[dict[str, Any], bytes]:
    """The next message. Raises EOFError if the other side is gone."""
    text_size, body_size = _SIZES.unpack(_exactly(connection, _SIZES.size))
    return json.loads(_exactly(connection, text_size)), _exactly(connection, body_size)


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = connection.recv(min(size - len(data), 2**20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)
