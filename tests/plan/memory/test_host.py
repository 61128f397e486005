"""Host memory of the fullest node."""

import pytest

from megatron_fipo.plan.memory.host import BUCKETS_IN_STORE, node_memory
from megatron_fipo.plan.memory.state import stage_state
from megatron_fipo.weight_sync import transport
from tests.plan.cases import recipe_case
from tests.plan.machines import toy_machine

GIB = 2**30


def parts(*overrides: str, name: str = "qwen2.5-32b", **case: object) -> dict[str, float]:
    found = node_memory(recipe_case(name, *overrides, **case))
    return {key: part.value for key, part in found.parts.items()}


def test_buckets_are_those_of_the_transport():
    assert BUCKETS_IN_STORE == transport.BUCKETS_IN_STORE


def test_a_rank_holds_shards_of_two_mini_steps_as_measured():
    """0.55 GiB per rank at 79 million trained tokens and 4 context-parallel ranks; 8,192 responses of the table's mean."""
    case = recipe_case("qwen2.5-32b").at(9_626 - 160)
    assert case.workload().trained_tokens == pytest.approx(79e6, rel=0.01)
    assert node_memory(case).parts["packs"].value / 8 == pytest.approx(0.55 * GIB, rel=0.1)
    assert node_memory(case).parts["object store"].value == pytest.approx(1.3 * GIB, rel=0.1)


def test_a_checkpoint_is_copied_to_the_host_once():
    """14 bytes per parameter over 4 context-parallel ranks, 8 ranks per node: 29 GB (docs/checkpoints.md)."""
    assert parts()["checkpoint"] == pytest.approx(29e9, rel=0.05)
    assert parts("parallel.data_parallel_size=2")["checkpoint"] == pytest.approx(parts()["checkpoint"] / 2)


def test_a_checkpoint_of_experts_is_shared_by_the_ranks_that_have_the_same():
    """Of the 8 ranks of a stage 4 share the other weights, and 2 each quarter of the experts. A node has one stage."""
    found = parts("parallel.expert_model_parallel_size=4", name="qwen3-30b-a3b")["checkpoint"]
    case = recipe_case("qwen3-30b-a3b")
    stage = stage_state(case.config, case.family, case.architecture, 0)
    others = stage.parameters - stage.expert_parameters
    experts = 2 * stage.expert_parameters  # the case's eight ranks hold half as many each
    assert found == pytest.approx(8 * 14 * (others / 4 + experts / 2))


def test_routes_of_the_engine_are_in_replies_and_shares():
    """48 layers x 8 experts, a byte each: once from the engines, and once for the data-parallel ranks of a node."""
    plain, replayed = (
        parts(f"model.router.replay={which}", name="qwen3-30b-a3b") for which in ("old_log_probs", "rollout")
    )
    tokens = recipe_case("qwen3-30b-a3b").workload().trained_tokens
    assert replayed["object store"] - plain["object store"] == pytest.approx(2 * 384 * tokens)
    assert replayed["packs"] - plain["packs"] == pytest.approx(8 * 2 / 8 * tokens / 4 * 768)


def test_offloaded_state_is_on_the_host():
    assert parts()["optimizer"] == 0
    half, all_of_it = (parts(f"optimizer.cpu_offload={share}")["optimizer"] for share in (0.5, 1.0))
    assert all_of_it == pytest.approx(2 * half)
    assert all_of_it == pytest.approx(parts()["checkpoint"] * 16 / 14, rel=1e-3)


def test_weights_pass_through_the_store_of_colocated_engines_only():
    separate = parts(name="qwen2.5-7b-math")["object store"]
    colocated = parts("rollout.placement=colocated", name="qwen2.5-7b-math")
    assert colocated["object store"] - separate == 3 * 256 * 2**20
    assert colocated["engines"] > 0


def test_engines_share_a_node_if_the_trainer_leaves_devices():
    assert parts()["engines"] == 0  # 128 ranks fill their nodes
    large = parts(machine=toy_machine(devices_per_node=256))
    per_worker = parts("rollout.placement=colocated", name="qwen2.5-7b-math")["engines"] / 8
    assert large["engines"] == pytest.approx(64 * per_worker)


def test_what_was_not_measured_is_named():
    found = node_memory(recipe_case("qwen2.5-32b")).total
    assert "host memory of a trainer rank on a GPU" in found.not_calibrated
    assert "recipe_scale, CPU machine, 2026-11-29" in found.sources
    assert found.low < found.value < found.high
