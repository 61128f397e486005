from dataclasses import replace

import pytest

from megatron_fipo.plan.estimate import exact
from megatron_fipo.plan.time.collectives import (
    Group,
    context_group,
    engine_group,
    pipeline_group,
    replica_group,
    tensor_group,
)
from megatron_fipo.plan.time.overlap import exposed
from tests.plan.machines import MACHINE, figure
from tests.plan.time.cases import case_of, layout

NODE, NETWORK = MACHINE.node.rate.value, MACHINE.network.rate.value
NO_TIME = figure(1e-12)
QUICK = replace(
    MACHINE,
    node=replace(MACHINE.node, latency=NO_TIME),
    network=replace(MACHINE.network, latency=NO_TIME),
)
GIB = 2.0**30


def test_groups_of_a_layout():
    """Tensor 4, context 2, data 2, pipeline 2 on nodes of 8: tensor and context fill a node."""
    case = case_of(**layout(tp=4, cp=2, dp=2, pp=2))
    tensor, context, replicas, pipeline = (
        group(case) for group in (tensor_group, context_group, replica_group, pipeline_group)
    )
    assert (tensor.size, tensor.distance, tensor.in_node) == (4, 1, True)
    assert (context.size, context.distance, context.in_node) == (2, 4, True)
    assert (replicas.size, replicas.distance, replicas.per_node) == (4, 4, 2)
    assert (pipeline.size, pipeline.distance, pipeline.in_node) == (2, 16, False)
    assert engine_group(case_of(rollout__engine_tensor_parallel_size=4)).in_node


class TestRings:
    def test_a_ring_in_a_node_moves_each_share_but_ones_own(self):
        assert Group(QUICK, 4).gather(GIB).value == pytest.approx(GIB * 3 / 4 / NODE)

    def test_a_ring_between_nodes_has_an_adapter_for_each_of_its_ranks(self):
        alone, together = Group(QUICK, 4, distance=8), Group(QUICK, 16)
        assert alone.gather(GIB).value == pytest.approx(GIB * 3 / 4 / NETWORK)
        assert together.gather(GIB).value == pytest.approx(GIB * 15 / 16 / min(8 * NETWORK, NODE))

    def test_an_all_reduce_is_two_rounds(self):
        assert Group(QUICK, 8).reduce(GIB).value == pytest.approx(2 * Group(QUICK, 8).gather(GIB).value)

    def test_small_messages_take_the_latency_of_every_step(self):
        latency = MACHINE.node.latency.value
        assert Group(MACHINE, 8).gather(8).value == pytest.approx(7 * latency, rel=1e-3)
        assert Group(MACHINE, 8).small_reduce(8).value == pytest.approx(2 * latency, rel=1e-3)


def test_an_exchange_sends_most_bytes_to_other_nodes():
    assert Group(QUICK, 8).exchange(GIB).value == pytest.approx(GIB * 7 / 8 / NODE)
    assert Group(QUICK, 16).exchange(GIB).value == pytest.approx(GIB / 2 / NETWORK)


def test_neighbours_in_other_nodes_are_reached_over_the_network():
    assert Group(QUICK, 2, distance=8).send(GIB).value == pytest.approx(GIB / NETWORK)
    assert Group(QUICK, 2, distance=4).send(GIB).value == pytest.approx(GIB / NODE)


def test_one_rank_communicates_nothing():
    one = Group(MACHINE, 1)
    for time in (one.gather, one.reduce, one.small_reduce, one.exchange, one.send):
        assert time(GIB) == exact(0.0)


def test_uncalibrated_links_are_reported():
    link = replace(MACHINE.network, rate=replace(MACHINE.network.rate, calibrated=False))
    between = Group(replace(MACHINE, network=link), 2, distance=8)
    assert between.gather(GIB).not_calibrated == {"network"}
    assert not Group(replace(MACHINE, network=link), 2).gather(GIB).not_calibrated


def test_exposed_time_is_what_exceeds_the_work_beside_it():
    long, short = figure(3.0).times(1, ""), figure(1.0).times(1, "")
    visible = exposed(long, short)
    assert (visible.low, visible.value, visible.high) == pytest.approx((1.8, 2.0, 2.2))
    assert exposed(short, long).high == 0
