import socket

import psutil
import pytest

from megatron_fipo.errors import UserError
from megatron_fipo.network import interface_of
from megatron_fipo.node.addresses import own_address, resolve, route_source


def test_a_job_of_one_node_uses_loopback():
    assert own_address(None, None) == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"


def test_a_named_interface_wins_over_the_route():
    assert own_address("lo", "192.0.2.1") == "127.0.0.1"


def test_an_interface_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(UserError, match=r"has no interface ib9 with an IPv4 address; it has .*lo"):
        own_address("ib9", None)


def test_a_peer_that_is_this_node_is_refused():
    with pytest.raises(UserError, match="localhost is an address of the node itself"):
        own_address(None, "localhost")


@pytest.mark.parametrize("host", ["a..b", "a" * 64 + ".b", "::1"])
def test_a_host_that_has_no_ipv4_address_is_refused(host):
    with pytest.raises(UserError, match="finds no IPv4 address of the host"):
        resolve(host)


def test_a_host_without_address_is_refused():
    with pytest.raises(UserError, match=r"finds no IPv4 address of the host no-such-host\.invalid"):
        resolve("no-such-host.invalid")


def test_every_address_of_this_machine_has_its_interface():
    for name, items in psutil.net_if_addrs().items():
        for item in items:
            if item.family == socket.AF_INET:
                assert interface_of(item.address) == name
                assert route_source("127.0.0.1") == "127.0.0.1"
