"""Sockets of a job's processes: ranks and engines listen on the address by which their node joined the Ray cluster alone.

On a cluster that a run starts on this machine that address is 127.0.0.1.
"""

import socket
import time
from collections.abc import Mapping

import psutil

from megatron_fipo.errors import UserError

LOOPBACK = "127.0.0.1"
ASK_EVERY_S = 2.0
"""Seconds between two questions of a `ServerWatch`."""


def node_address() -> str:
    """The address by which this node joined the Ray cluster; 127.0.0.1 in a process without Ray."""
    import ray

    return ray.util.get_node_ip_address() if ray.is_initialized() else LOOPBACK


def listen(address: str) -> socket.socket:
    """A socket that listens on a free port of this address alone. `UserError` if this node has no such address."""
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        listener.bind((address, 0))
    except OSError as error:
        listener.close()
        raise UserError(
            f"this node joined the Ray cluster as {address}, where it cannot listen ({error.strerror}); "
            "start Ray there with --node-ip-address and an address that `ip addr` lists"
        ) from None
    listener.listen()
    return listener


def free_port(address: str) -> int:
    """A port of this address that nothing uses at the moment. Errors as `listen`."""
    with listen(address) as listener:
        return listener.getsockname()[1]


def interface_of(address: str) -> str | None:
    """The name of this node's network interface with this address; None if no interface has it."""
    for name, entries in psutil.net_if_addrs().items():
        # IPv6 addresses of one link end with its name, as in fe80::1%eth0
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return name
    return None


def socket_variables(interface: str | None, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that keep gloo and NCCL on this interface; without those that `environment` has."""
    if interface is None:
        return {}
    # NCCL takes a name as a prefix unless it begins with =.
    variables = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}
    return {name: value for name, value in variables.items() if name not in environment}


def host_and_port(address: str) -> tuple[str, int]:
    """The parts of HOST:PORT."""
    host, _, port = address.rpartition(":")
    return host, int(port)


def accepts(address: str, port: int) -> bool:
    """Whether something accepts connections there, within a second."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((address, port)) == 0


class ServerWatch:
    """Asks whether a server accepts connections. A node without power closes none, so its peers notice minutes later."""

    def __init__(self, address: str, patience_s: float) -> None:
        """`address` is HOST:PORT."""
        self._host, self._port = host_and_port(address)
        self._patience_s = patience_s
        self._answered = self._asked = time.monotonic()

    def is_lost(self) -> bool:
        """Whether it has not answered for `patience_s`. Asks at most every `ASK_EVERY_S`, for a second."""
        now = time.monotonic()
        if now - self._asked >= min(ASK_EVERY_S, self._patience_s / 10):
            self._asked = now
            if self.answers():
                self._answered = now
        return now - self._answered >= self._patience_s

    def answers(self) -> bool:
        """Whether it accepts a connection now."""
        return accepts(self._host, self._port)
