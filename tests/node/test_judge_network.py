from dataclasses import replace
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.node.preflight.facts import Fault, Link, NetworkFacts
from megatron_fipo.node.preflight.judge import bad_nodes
from megatron_fipo.node.preflight.judge_network import judge_network, pair_speeds, slow_nodes
from megatron_fipo.node.preflight.limits import PreflightLimits
from tests.node.measured import healthy, with_speeds

LIMITS = PreflightLimits()


def faults(count: int, speeds: dict[tuple[str, str], float | str]) -> list[Fault]:
    return list(judge_network(with_speeds(healthy(count), speeds), LIMITS))


@given(st.integers(3, 12), st.data())
def test_slow_nodes_are_told_from_their_peers(count: int, data: st.DataObject) -> None:
    nodes = tuple(f"n{index}" for index in range(count))
    planted = data.draw(st.sets(st.sampled_from(nodes), max_size=(count - 1) // 2))
    met = set(combinations(nodes, 2))
    slow = {pair for pair in met if planted & set(pair)}
    assert set(slow_nodes(nodes, met, slow)) == planted


@given(st.integers(4, 12), st.data())
def test_one_slow_pair_is_no_slow_node(count: int, data: st.DataObject) -> None:
    nodes = tuple(f"n{index}" for index in range(count))
    met = set(combinations(nodes, 2))
    pair = data.draw(st.sampled_from(sorted(met)))
    assert slow_nodes(nodes, met, {pair}) == ()


def test_a_slow_node() -> None:
    found = faults(4, {("n0", "n2"): 1.2, ("n1", "n2"): 1.25, ("n2", "n3"): 1.1})
    assert [fault.nodes for fault in found] == [("n2",)]
    assert (
        "n2 is slow with 3 of 3 nodes: half of its pairs reach at most 1.2 GB/s, 10 are needed"
        in found[0].sentence
    )


def test_a_slow_pair() -> None:
    found = faults(4, {("n1", "n3"): 1.25})
    assert [fault.nodes for fault in found] == [("n1", "n3")]
    assert found[0].sentence.startswith(
        "n1 and n3 exchange 1.25 GB/s, 10 are needed (--min-bandwidth-gb-per-s)"
    )


def test_a_pair_that_cannot_exchange() -> None:
    assert "n0 and n1 cannot exchange data: timed out" in faults(2, {("n0", "n1"): "timed out"})[0].sentence


def test_a_node_that_nobody_reaches() -> None:
    found = faults(3, {("n0", "n2"): "timed out", ("n1", "n2"): "timed out"})
    assert [fault.nodes for fault in found] == [("n2",)]
    assert "2 exchanges failed, the first with: timed out" in found[0].sentence


def test_every_pair_slow_is_a_fault_of_the_network() -> None:
    nodes = [f"n{index}" for index in range(4)]
    found = faults(4, dict.fromkeys(combinations(nodes, 2), 1.2))
    assert len(found) == 1
    assert "every pair of nodes is slow: the fastest reaches 1.2 GB/s" in found[0].sentence
    assert bad_nodes(found, nodes) == []


def test_no_pair_that_can_exchange_is_a_fault_of_the_network() -> None:
    nodes = [f"n{index}" for index in range(3)]
    (fault,) = faults(3, dict.fromkeys(combinations(nodes, 2), "connection refused"))
    assert "the fastest reaches 0 GB/s (an exchange that failed: connection refused)" in fault.sentence
    assert not fault.exclude


def test_many_nodes_have_more_time() -> None:
    assert [LIMITS.exchange_time_s(nodes) for nodes in (1, 16, 64)] == [60.0, 60.0, 240.0]


def test_a_slow_all_reduce_of_fast_pairs() -> None:
    found = healthy(3)
    slow = {name: replace(facts, all_reduce_gb_per_s=2.0) for name, facts in found.network.items()}
    (fault,) = judge_network(replace(found, network=slow), LIMITS)
    assert "an all-reduce over all nodes reaches 2 GB/s of bus bandwidth, 10 are needed" in fault.sentence
    assert not fault.exclude


def test_exchanges_that_end_early_name_the_node() -> None:
    found = healthy(3)
    network = {**found.network, "n2": replace(found.network["n2"], failure="NCCL error")}
    (fault,) = judge_network(replace(found, network=network), LIMITS)
    assert fault.nodes == ("n2",)
    assert fault.exclude


def test_a_pair_is_as_fast_as_its_slower_end_summed_over_gpus() -> None:
    found = healthy(2)
    network = {
        "n0": NetworkFacts((Link("n0", "n1", 0, 50.0), Link("n0", "n1", 1, 40.0))),
        "n1": NetworkFacts((Link("n0", "n1", 0, 45.0), Link("n0", "n1", 1, 48.0))),
    }
    assert pair_speeds(replace(found, network=network))["n0", "n1"].gb_per_s == 85.0
