"""Sockets on one address of this node."""

import socket

import psutil
import pytest

from megatron_fipo.errors import UserError
from megatron_fipo.network import LOOPBACK, free_port, interface_of, listen, node_address, socket_variables


def test_listens_on_the_address_alone():
    with listen(LOOPBACK) as listener:
        assert listener.getsockname()[0] == LOOPBACK
        with socket.create_connection(listener.getsockname(), timeout=5):
            pass
        others = [
            entry.address
            for entries in psutil.net_if_addrs().values()
            for entry in entries
            if entry.family == socket.AF_INET and entry.address != LOOPBACK
        ]
        for address in others:
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((address, listener.getsockname()[1]), timeout=5)


def test_an_address_of_another_machine_is_one_sentence():
    with pytest.raises(UserError, match=r"joined the Ray cluster as 203\.0\.113\.7, where it cannot listen"):
        free_port("203.0.113.7")


def test_gloo_and_nccl_stay_on_the_interface_of_the_address():
    assert interface_of(LOOPBACK) == "lo"
    assert socket_variables("lo", {}) == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
    assert socket_variables("lo", {"NCCL_SOCKET_IFNAME": "ib0"}) == {"GLOO_SOCKET_IFNAME": "lo"}
    assert socket_variables(interface_of("203.0.113.7"), {}) == {}


def test_without_ray_a_process_is_alone():
    assert node_address() == LOOPBACK
