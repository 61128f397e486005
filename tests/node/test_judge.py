"""Each fault is found, and its sentence names the node, the measurement, the threshold and the fix."""

import json
from dataclasses import replace
from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from megatron_fipo.config.card_rules import CardNeeds, card_findings
from megatron_fipo.environment import Accelerators, Card, Driver
from megatron_fipo.node.preflight.facts import (
    ClockOffset,
    Gpus,
    Measurements,
    NetworkFacts,
    ProcessLimits,
    Product,
    Space,
    Xid,
    from_json,
    to_json,
)
from megatron_fipo.node.preflight.judge import bad_nodes, judge
from megatron_fipo.node.preflight.judge_others import card_warnings
from megatron_fipo.node.preflight.limits import PreflightLimits, limits_for
from megatron_fipo.node.preflight.render import print_preflight
from tests.node.measured import GPU, HEALTHY, healthy, with_node

LIMITS = PreflightLimits(gpus_per_node=8)
GPUS = HEALTHY.gpus
assert GPUS is not None
assert GPUS.listed is not None


def one_fault(found: Measurements, limits: PreflightLimits = LIMITS) -> str:
    """The sentence of the only fault, which must be one of node n1 and exclude it."""
    faults = judge(found, limits)
    assert [fault.nodes for fault in faults] == [("n1",)], faults
    assert bad_nodes(faults, found.names) == ["n1"]
    return faults[0].sentence


@pytest.mark.parametrize("count", [1, 2, 5])
def test_healthy_nodes(count: int) -> None:
    assert judge(healthy(count), LIMITS) == []


def test_a_gpu_that_torch_does_not_see() -> None:
    changed = replace(GPUS, by_torch=GPUS.by_torch[:7])
    faults = judge(with_node(healthy(3), "n1", gpus=changed), LIMITS)
    assert [fault.nodes for fault in faults] == [("n1",), ("n1",)]
    assert faults[0].sentence.startswith("n1: torch sees 7 GPUs and nvidia-smi lists 8, of 8 requested")
    assert (
        "n1 has 7 GPUs by torch and 8 by nvidia-smi, most nodes have 8 GPUs by torch and 8 by nvidia-smi"
        in faults[1].sentence
    )


def test_a_gpu_fewer_than_on_other_nodes_without_a_request() -> None:
    changed = replace(GPUS, listed=GPUS.listed[:7])
    sentence = one_fault(with_node(healthy(3), "n1", gpus=changed), PreflightLimits())
    assert "n1 has 8 GPUs by torch and 7 by nvidia-smi" in sentence


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        (replace(GPUS, listed=None, smi_error="GPU is lost"), "n1: nvidia-smi failed: GPU is lost"),
        (
            replace(GPUS, listed=(replace(GPU, index=3, uncorrected_ecc=2), *GPUS.listed[1:])),
            "n1: GPU 3 has 2 uncorrected memory errors, 0 are allowed; reset it",
        ),
        (
            replace(GPUS, listed=(replace(GPU, remap_pending=True), *GPUS.listed[1:])),
            "n1: GPU 0 has memory rows that wait",
        ),
        (
            replace(GPUS, listed=(replace(GPU, remap_failed=True, remap_pending=True), *GPUS.listed[1:])),
            "n1: GPU 0 could not remap a row",
        ),
        (replace(GPUS, xids=(Xid(79, "0000:1b:00", 2.0),)), "XID 79 of GPU 0000:1b:00 2.0 hours ago"),
    ],
)
def test_gpu_health(gpus: Gpus, expected: str) -> None:
    found = with_node(healthy(3), "n1", gpus=gpus)
    sentences = [fault.sentence for fault in judge(found, LIMITS) if fault.check == "GPU health"]
    assert len(sentences) == 1
    assert expected in sentences[0]


H100 = Card("NVIDIA H100 80GB HBM3", (9, 0), 80 * 2**30)
ACCELERATORS = Accelerators((9, 0), "13.0", None, cards=(H100,) * 8)


def test_gpus_that_training_would_refuse_are_a_fault_with_the_same_sentence() -> None:
    unused = replace(ACCELERATORS, cards=(), capability=None, unused_driver=Driver("535.104.05", 8))
    expected = card_findings(unused, CardNeeds())[0].sentence
    sentence = one_fault(with_node(healthy(3), "n1", gpus=replace(GPUS, accelerators=unused)))
    assert sentence == f"n1: {expected}"
    old = replace(ACCELERATORS, cards=(replace(H100, capability=(7, 5)),), capability=(7, 5))
    found = with_node(healthy(3), "n1", gpus=replace(GPUS, accelerators=old))
    assert "model.dtype=bfloat16 needs GPUs of compute capability 8.0" in one_fault(found)
    assert judge(found, replace(LIMITS, dtype="float32")) == []
    assert not [fault for fault in judge(with_all(old), LIMITS) if fault.exclude], "of all nodes: the set-up"


def with_all(accelerators: Accelerators) -> Measurements:
    found = healthy(3)
    for name in found.names:
        found = with_node(found, name, gpus=replace(GPUS, accelerators=accelerators))
    return found


def test_nodes_with_other_cards_are_a_warning() -> None:
    found = with_all(ACCELERATORS)
    assert card_warnings(found) == []
    a100 = replace(H100, name="NVIDIA A100-SXM4-40GB", capability=(8, 0), memory_bytes=40 * 2**30)
    other = replace(ACCELERATORS, cards=(a100,) * 8, capability=(8, 0))
    mixed = with_node(found, "n1", gpus=replace(GPUS, accelerators=other))
    (warning,) = card_warnings(mixed)
    assert "16 x NVIDIA H100 80GB HBM3 (80 GiB), 8 x NVIDIA A100-SXM4-40GB (40 GiB)" in warning
    assert judge(mixed, LIMITS) == []
    console = Console(file=StringIO(), width=120)
    print_preflight(mixed, [], console)
    assert f"warning {warning}." in " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]


def test_facts_of_gpus_survive_the_way_between_nodes() -> None:
    facts = replace(GPUS, accelerators=replace(ACCELERATORS, unused_driver=Driver("580.1", 1)))
    assert from_json(Gpus, json.loads(json.dumps(to_json(facts)))) == facts


def test_an_old_hardware_error_is_no_fault() -> None:
    assert not judge(with_node(healthy(3), "n1", gpus=replace(GPUS, xids=(Xid(79, "x", 24.1),))), LIMITS)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"products": (Product("cuda:5", 16_777_216, 3, 1000, 600.0),)},
            "n1: a matrix product on cuda:5 has 1,000 wrong elements of 16,777,216, 3 of them NaN, 0 are allowed",
        ),
        (
            {"space": (Space("/tmp", 9.99), Space("/dev/shm", 900.0))},
            "n1: /tmp has 9.99 GiB free, 10 are needed (--min-tmp-gib); delete files there",
        ),
        (
            {"space": (Space("/tmp", 10.0), Space("/dev/shm", 0.06))},
            "n1: /dev/shm has 0.06 GiB free, 8 are needed (--min-shm-gib)",
        ),
        (
            {"limits": ProcessLimits(1024, 1_048_576, None, ())},
            "n1: a process may open 1024 files (ulimit -n), 65535 are needed (--min-open-files); put ulimit -n 65535 into",
        ),
        (
            {"limits": ProcessLimits(1024, 4096, None, ())},
            "have the administrator raise the hard limit, which is 4096",
        ),
        (
            {"limits": ProcessLimits(65_535, None, 0.0078125, ("mlx5_0",))},
            "n1: a process may lock 0.00781 GiB of memory (ulimit -l), RDMA needs 64",
        ),
        (
            {"failures": {"space": "it did not end in time"}, "space": None},
            "n1: the look at the free space of /tmp and /dev/shm gave no result, with 45 s allowed: it did not end in time",
        ),
        (
            {"versions": {**(HEALTHY.versions or {}), "torch": "2.12.0"}},
            "n1 has torch 2.12.0, most nodes have torch 2.13.0; use the same environment",
        ),
        (
            {"versions": {"Python": "3.12.3", "torch": "2.13.0", "source of megatron-fipo": "ba9876543210"}},
            "n1 has source of megatron-fipo ba9876543210, most nodes have source of megatron-fipo 0123456789ab",
        ),
    ],
)
def test_faults_of_a_node(changes: dict, expected: str) -> None:
    assert expected in one_fault(with_node(healthy(3), "n1", **changes))


def test_of_two_nodes_the_head_counts_as_right() -> None:
    found = with_node(healthy(2), "n0", versions={**(HEALTHY.versions or {}), "torch": "2.12.0"})
    assert "n1 has torch 2.13.0, the other node has torch 2.12.0" in one_fault(found)


def test_locked_memory_matters_for_rdma_only() -> None:
    assert not judge(with_node(healthy(3), "n1", limits=ProcessLimits(None, None, 0.01, ())), LIMITS)


def test_missing_nodes() -> None:
    found = healthy(3)
    absent = replace(
        found,
        nodes={name: found.nodes[name] for name in ("n0", "n2")},
        network={name: found.network[name] for name in ("n0", "n2")},
    )
    assert "n1 did not answer in 60 s" in one_fault(absent)
    silent = replace(found, network={name: found.network[name] for name in ("n0", "n2")})
    assert "n1 answered at first but did not finish" in one_fault(silent)


def test_clock_skew() -> None:
    found = healthy(3)

    def skewed(seconds: float, uncertainty: float) -> Measurements:
        head = replace(found.network["n0"], clocks=(ClockOffset("n1", seconds, uncertainty),))
        return replace(found, network={**found.network, "n0": head})

    assert "the clock of n1 is 2.5 s behind that of n0, 1 s are allowed (--max-clock-skew-s)" in one_fault(
        skewed(-2.5, 0.1)
    )
    assert not judge(skewed(1.05, 0.1), LIMITS)


def test_an_unshared_folder() -> None:
    found = replace(healthy(3), canary={"n0": None, "n1": "it is not there", "n2": None})
    assert "n1 does not share /shared/run with n0: it is not there; mount" in one_fault(found)


def test_a_folder_that_no_node_shares_excludes_none() -> None:
    found = replace(healthy(3), canary={"n0": None, "n1": "not there", "n2": "not there"})
    faults = judge(found, LIMITS)
    assert [fault.nodes for fault in faults] == [("n1",), ("n2",)]
    assert bad_nodes(faults, found.names) == []


def test_a_fault_of_the_set_up_excludes_no_node() -> None:
    found = healthy(3)
    for name in found.names:
        found = with_node(found, name, limits=ProcessLimits(1024, 2048, None, ()))
    faults = judge(found, LIMITS)
    assert [fault.nodes for fault in faults] == [("n0",), ("n1",), ("n2",)]
    assert bad_nodes(faults, found.names) == []


def test_thresholds_can_be_switched_off() -> None:
    bare = with_node(
        healthy(2),
        "n1",
        space=(Space("/tmp", 0.0), Space("/dev/shm", 0.0)),
        limits=ProcessLimits(64, 64, 0, ("x",)),
    )
    off = PreflightLimits(min_tmp_gib=0, min_shm_gib=0, min_open_files=0, min_locked_memory_gib=0)
    assert judge(bare, off) == []


def test_nodes_without_gpus_have_lower_defaults_unless_chosen() -> None:
    assert limits_for(True, True, {}) == PreflightLimits()
    on_cpus = limits_for(False, False, {"min_tmp_gib": 3.0})
    assert (on_cpus.min_tmp_gib, on_cpus.min_shm_gib, on_cpus.min_bandwidth_gb_per_s) == (3.0, 1.0, 0.0)


def test_bandwidth_between_cpus_has_no_default_threshold() -> None:
    without = with_node(healthy(2), "n1", gpus=replace(GPUS, by_torch=()))
    assert (without.has_gpus, without.between_gpus) == (True, False)
    assert limits_for(True, False, {}).min_bandwidth_gb_per_s == 0.0
    assert limits_for(True, False, {"min_bandwidth_gb_per_s": 3.0}).min_bandwidth_gb_per_s == 3.0


@given(st.integers(1, 4))
def test_measurements_survive_json(count: int) -> None:
    found = healthy(count)
    assert from_json(Measurements, to_json(found)) == found


def test_data_of_another_type_are_refused() -> None:
    data = to_json(healthy(1))
    data["seconds"] = "1"
    with pytest.raises(TypeError, match="'1' is not of type"):
        from_json(Measurements, data)


def test_network_facts_of_a_node_that_failed_are_kept() -> None:
    facts = NetworkFacts(failure="it did not end in time")
    assert from_json(NetworkFacts, to_json(facts)) == facts
