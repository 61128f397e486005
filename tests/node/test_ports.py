"""Blocks of ports, and that two jobs on one node never have the same."""

import socket
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.errors import UserError
from megatron_fipo.node.ports import BLOCK, SERVERS, Ports, blocks, claim, ephemeral_floor

jobs = st.integers(1, 2**31)
floors = st.integers(4096, 60000)


@given(jobs, floors)
def test_blocks_are_below_the_ephemeral_range_unprivileged_and_apart(job, floor):
    found = list(blocks(job, floor))
    assert found
    assert len({ports.first for ports in found}) == len(found)
    firsts = sorted(ports.first for ports in found)
    assert firsts[0] >= 1024
    assert firsts[-1] + BLOCK <= floor
    assert all(second - first >= BLOCK for first, second in pairwise(firsts))


@given(jobs, floors)
def test_the_next_job_starts_with_another_block(job, floor):
    if len(list(blocks(job, floor))) > 1:
        assert next(blocks(job, floor)) != next(blocks(job + 1, floor))


def test_the_ports_of_a_block_are_all_different_and_within_it():
    ports = Ports(11264)
    used = [ports.claim, *(ports.server(name) for name in SERVERS), *ports.workers]
    assert sorted(used) == list(range(11264, 11264 + BLOCK))


def test_a_block_with_a_port_in_use_is_passed_over():
    job, floor = 4, ephemeral_floor()
    first, second, *_ = blocks(job, floor)
    with socket.socket() as other:
        other.bind(("127.0.0.1", first.workers[500]))
        ports, holder = claim("127.0.0.1", job, floor)
        holder.close()
        assert ports == second


def test_two_claims_of_one_job_number_give_different_blocks():
    ports, holder = claim("127.0.0.1", 7, ephemeral_floor())
    other, other_holder = claim("127.0.0.1", 7, ephemeral_floor())
    assert ports != other
    for port in (ports.server("gcs"), ports.workers[-1]):  # free for Ray
        with socket.socket() as server:
            server.bind(("127.0.0.1", port))
    holder.close()
    other_holder.close()


def test_a_node_without_free_ports_is_named():
    with pytest.raises(UserError, match=f"{socket.gethostname()} has no 1,024 free ports in a row between"):
        claim("127.0.0.1", 1, floor=1500)
    for block in blocks(1, 3000):
        holder = socket.create_server(("127.0.0.1", block.claim))
        with holder, pytest.raises(UserError, match="has no 1,024 free ports"):
            claim("127.0.0.1", 1, floor=3000)


def test_the_floor_is_the_kernels(tmp_path):
    source = tmp_path / "range"
    source.write_text("9000\t65535\n")
    assert ephemeral_floor(source) == 9000
    assert 1024 < ephemeral_floor() < 65536
