"""Which of a node's addresses its processes use: that of the route to the other nodes."""

import socket

import psutil

from megatron_fipo.errors import UserError, one_line
from megatron_fipo.network import LOOPBACK


def own_address(interface: str | None, peer: str | None) -> str:
    """The IPv4 address of `interface`; without one, the source address of packets to the host `peer`; loopback without both.

    Raises UserError if there is none, and if the route to `peer` does not leave this node.
    """
    if interface is not None:
        return address_of(interface)
    if peer is None:
        return LOOPBACK
    address = route_source(resolve(peer))
    if address.startswith("127."):
        raise UserError(
            f"{peer} is an address of the node itself on {socket.gethostname()}; name the network's interface (INTERFACE=...)"
        )
    return address


def resolve(host: str) -> str:
    """The IPv4 address of a host name, or the address itself. Raises UserError."""
    try:
        return socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]  # type: ignore[return-value]
    except (OSError, UnicodeError) as error:  # a name with an empty or long part
        reason = error.strerror if isinstance(error, OSError) else one_line(error)
        raise UserError(
            f"{socket.gethostname()} finds no IPv4 address of the host {host}: {reason}; name the network's interface "
            "(INTERFACE=...)"
        ) from None


def route_source(address: str) -> str:
    """The local address from which packets to `address` leave. Sends none. Raises UserError if there is no route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError as error:
            raise UserError(f"{socket.gethostname()} has no route to {address}: {error.strerror}") from None
        return probe.getsockname()[0]


def address_of(interface: str) -> str:
    """The first IPv4 address of a network interface. Raises UserError, with the interfaces that have one."""
    found = _addresses()
    if interface not in found:
        raise UserError(
            f"{socket.gethostname()} has no interface {interface} with an IPv4 address; it has {', '.join(sorted(found))}"
        )
    return found[interface][0]


def _addresses() -> dict[str, list[str]]:
    """IPv4 addresses of each interface that has some."""
    found = {
        name: [item.address for item in items if item.family == socket.AF_INET]
        for name, items in psutil.net_if_addrs().items()
    }
    return {name: addresses for name, addresses in found.items() if addresses}
