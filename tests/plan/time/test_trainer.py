from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.errors import UserError
from megatron_fipo.families.family import Experts
from megatron_fipo.families.flops import model_flops
from megatron_fipo.plan.layout import mini_steps
from megatron_fipo.plan.time.layer import FUSED_RATE, ROUTER_BYTES, layer_time
from megatron_fipo.plan.time.packs import Packs, mini_step_packs
from megatron_fipo.plan.time.trainer import score_time, update_time
from tests.plan.machines import MACHINE
from tests.plan.time.cases import SHAPE, case_of, layout

sizes = st.sampled_from([1, 2, 4])
layouts = st.builds(layout, tp=st.sampled_from([1, 2, 4, 8]), cp=sizes, pp=sizes, dp=sizes)
means = st.floats(500, 15_000)


@settings(deadline=None, max_examples=25)
@given(st.builds(layout, tp=sizes, cp=sizes, dp=sizes), means, st.floats(1.1, 1.3))
def test_time_grows_with_the_length_of_responses(sizes, mean, longer):
    """Without a pipeline. With one, two small micro-batches can take less than a large one: the bubble is shorter."""
    for time in (update_time, score_time):
        assert time(case_of(mean * longer, **sizes)).total.value > time(case_of(mean, **sizes)).total.value


@settings(deadline=None, max_examples=25)
@given(layouts, means, st.sampled_from(["none", "selective", "full"]))
def test_time_is_never_below_the_arithmetic(sizes, mean, recompute):
    """At the rate of products; attention is slower on this machine."""
    case = case_of(mean, model__recompute=recompute, **sizes)
    work, flops = case.workload(), model_flops(case.family, case.architecture)
    forward = (
        flops.per_token * work.trained_tokens
        + flops.per_pair * work.trained * work.mean_square / 2
        + flops.per_row * work.trained * work.response.mean
    )
    rate = MACHINE.products["bfloat16"].rate.value * case.trainer_devices
    assert update_time(case).total.value > 3 * forward / rate
    assert score_time(case).total.value > forward / rate


@settings(deadline=None, max_examples=25)
@given(layouts, means)
def test_bounds_enclose_every_part(sizes, mean):
    for part in update_time(case_of(mean, **sizes)).parts.values():
        assert 0 <= part.low <= part.value <= part.high


@pytest.mark.parametrize("parallel", [True, False])
def test_more_tensor_ranks_never_multiply_longer(parallel):
    cases = [case_of(**layout(tp=tp)) for tp in (1, 2, 4, 8)]
    for case in cases[1:]:
        case.config.parallel.sequence_parallel = parallel
    products = [update_time(case).parts["products"].value for case in cases]
    assert products == sorted(products, reverse=True)


def test_efficiency_of_products_falls_with_the_shorter_side():
    """8 tensor ranks multiply an eighth of the operations, with sides of 512 instead of 4,096, in more than an eighth of the time."""
    one, eight = (update_time(case_of(**layout(tp=tp))).parts["products"].value for tp in (1, 8))
    assert one / 8 * 1.05 < eight < one / 4


def test_a_single_rank_has_no_communication():
    parts = update_time(case_of()).parts
    for name in ("tensor parallel", "context parallel", "experts", "data parallel", "pipeline", "bubble"):
        assert parts[name].value == 0


class TestPipeline:
    def test_one_stage_has_no_bubble(self):
        for dp in (1, 4):
            assert update_time(case_of(**layout(dp=dp))).parts["bubble"].value == 0

    def test_the_bubble_is_the_time_of_the_other_stages(self):
        """m micro-batches through p stages take m + p − 1 turns, the last of each with the head."""
        case = case_of(**layout(pp=4))
        packs, layer = mini_step_packs(case), layer_time(case, mini_step_packs(case))
        turn = 8 * sum(part.value for way in (layer.forward, layer.backward) for part in way.values())
        assert update_time(case).parts["bubble"].value == pytest.approx(4 * 3 * turn)
        assert packs.count > 4

    def test_two_chunks_halve_the_bubble_and_hide_sends(self):
        plain, interleaved = (update_time(case_of(**layout(pp=4, vpp=chunks))).parts for chunks in (None, 2))
        assert interleaved["bubble"].value == pytest.approx(plain["bubble"].value / 2, rel=0.05)
        assert interleaved["pipeline"].value < plain["pipeline"].value / 3

    def test_stages_divide_the_layers(self):
        one, four = (update_time(case_of(**layout(pp=pp))).parts["products"].value for pp in (1, 4))
        assert four == pytest.approx(one / 4)


class TestRecompute:
    def test_full_adds_a_forward_pass_of_the_layers(self):
        case = case_of(model__recompute="full", **layout(tp=4))
        forward = score_time(case).parts
        layers = sum(part.value for name, part in forward.items() if name != "head")
        assert update_time(case).parts["recompute"].value == pytest.approx(layers)

    def test_selective_adds_core_attention(self):
        case = case_of(model__recompute="selective")
        assert update_time(case).parts["recompute"].value == pytest.approx(
            score_time(case).parts["attention"].value
        )

    def test_none_adds_nothing(self):
        assert update_time(case_of()).parts["recompute"].value == 0


class TestHead:
    def test_kept_logits_save_a_product_of_four(self):
        recomputed = update_time(case_of(head__workspace_mb=10**6)).parts["head"].value
        kept = (
            update_time(case_of(head__workspace_mb=10**6, head__logits_memory_mb=10**6)).parts["head"].value
        )
        assert recomputed / kept == pytest.approx(4 / 3, rel=0.06)

    def test_a_small_workspace_costs_time(self):
        assert (
            update_time(case_of(head__workspace_mb=32)).parts["head"].value
            > update_time(case_of()).parts["head"].value
        )


class TestData:
    def test_overlap_hides_the_reduction_behind_the_last_backward_pass(self):
        exposed, hidden = (
            update_time(case_of(parallel__overlap_communication=overlap, **layout(tp=8, dp=8))).parts[
                "data parallel"
            ]
            for overlap in (False, True)
        )
        assert 0 < hidden.value < exposed.value / 2

    def test_context_ranks_share_gradients_too(self):
        assert update_time(case_of(**layout(cp=2))).parts["data parallel"].value > 0

    def test_offload_moves_the_optimizer_to_the_slower_link_and_is_reported(self):
        plain, offloaded = (update_time(case_of(optimizer__cpu_offload=share)) for share in (0.0, 1.0))
        assert offloaded.parts["optimizer"].value > plain.parts["optimizer"].value
        assert "AdamW on the host" in offloaded.total.not_calibrated
        assert "AdamW on the host" not in plain.total.not_calibrated


class TestHost:
    def test_short_micro_batches_wait_for_the_host(self):
        """Some 280 tokens: a layer's kernels take less than the millisecond that starting them takes."""
        small = replace(SHAPE, hidden_size=1024, ffn_hidden_size=2048, num_attention_heads=8)
        case = case_of(
            100.0,
            architecture=small,
            batch__max_tokens_per_micro_batch=300,
            rollout__max_response_length=200,
        )
        parts = update_time(case).parts
        turns = mini_steps(case.config) * small.num_layers * (mini_step_packs(case).count + 1)
        device = parts["products"].value + parts["attention"].value + parts["elementwise"].value
        assert device + parts["host"].value == pytest.approx(turns * MACHINE.layer_host.value, rel=0.02)

    def test_fp8_needs_more_launches_and_faster_products(self):
        bfloat16, fp8 = (update_time(case_of(model__fp8=kind)).parts for kind in ("none", "hybrid"))
        assert fp8["products"].value < bfloat16["products"].value
        assert fp8["elementwise"].value > bfloat16["elementwise"].value
        assert fp8["head"].value == bfloat16["head"].value


class TestExperts:
    EXPERTS = Experts(count=64, per_token=4, ffn_hidden_size=1024, normalized=True)
    DENSE = replace(SHAPE, ffn_hidden_size=1024)

    def parts(self, experts: Experts | None, load: float = 1.2, **settings: Any):
        case = case_of(architecture=replace(self.DENSE, experts=experts), **settings)
        case = replace(case, assumptions=replace(case.assumptions, expert_load=load))
        return update_time(case).parts

    def test_active_experts_multiply(self):
        """Four feed-forward parts of the width of one, and the attention of one layer."""
        dense = self.parts(None, **layout(dp=4))["products"].value
        assert dense < self.parts(self.EXPERTS, **layout(dp=4))["products"].value < 4 * dense

    def test_layers_without_experts_are_dense(self):
        """8 of 32 layers."""
        mixed = replace(self.EXPERTS, dense_layers=(0, 5, 10, 11, 12, 20, 30, 31))
        all_dense, some, none = (self.parts(which) for which in (None, mixed, self.EXPERTS))
        for name in ("products", "attention", "elementwise"):
            expected = (8 * all_dense[name].value + 24 * none[name].value) / 32
            assert some[name].value == pytest.approx(expected)

    def test_exchanges_grow_when_they_leave_the_node(self):
        inside, across = (
            self.parts(self.EXPERTS, **layout(dp=16, ep=size))["experts"].value for size in (8, 16)
        )
        assert across > 2 * inside

    def test_one_rank_exchanges_nothing(self):
        assert self.parts(self.EXPERTS, **layout(dp=4))["experts"].value == 0

    def test_all_ranks_wait_for_the_fullest(self):
        """It gets 1.5 times the tokens. Without expert parallelism every rank has the experts of its own tokens."""
        even, uneven = (self.parts(self.EXPERTS, load, **layout(dp=8, ep=8)) for load in (1.0, 1.5))
        alone = [self.parts(self.EXPERTS, load, **layout(dp=8))["products"].value for load in (1.0, 1.5)]
        assert uneven["experts"].value == pytest.approx(1.5 * even["experts"].value, rel=0.01)
        assert even["products"].value < uneven["products"].value < 1.5 * even["products"].value
        assert alone[0] == alone[1]

    def test_experts_that_tensor_ranks_share_gather_their_tokens_and_are_not_calibrated(self):
        shared = self.parts(self.EXPERTS, **layout(tp=2, ep=1, etp=2))["experts"]
        complete = self.parts(self.EXPERTS, **layout(tp=2, ep=2))["experts"]
        assert shared.value > complete.value / 2 > 0
        assert "experts on several tensor ranks" in shared.not_calibrated - complete.not_calibrated

    def test_a_choice_among_more_experts_takes_longer(self):
        """By the bytes of their scores and masks, over 2,048 tokens on two sequence-parallel ranks."""
        found = []
        for count in (64, 256):
            routed = replace(self.DENSE, experts=replace(self.EXPERTS, count=count))
            pack = Packs(count=1, tokens=4096.0, pairs=4096.0**2 / 2, rows=4096.0)
            found.append(layer_time(case_of(architecture=routed, **layout(tp=2)), pack))
        few, many = (time.forward["elementwise"].value for time in found)
        size = 192 * 2048 * ROUTER_BYTES[0]
        assert many - few == pytest.approx(size / MACHINE.memory.value / FUSED_RATE)

    def test_a_router_is_not_multiplied_in_fp8(self):
        """FP8's rate is higher, and a router as wide as the feed-forward part shows it."""
        experts = replace(self.EXPERTS, count=1024, per_token=1, ffn_hidden_size=128)
        parts = [self.parts(experts, model__fp8=kind)["products"].value for kind in ("none", "hybrid")]
        dense = [self.parts(None, model__fp8=kind)["products"].value for kind in ("none", "hybrid")]
        assert parts[1] / parts[0] > dense[1] / dense[0]

    def test_their_products_are_not_calibrated(self):
        assert "products of experts" in self.parts(self.EXPERTS)["products"].not_calibrated
        assert "products of experts" not in self.parts(None)["products"].not_calibrated

    def test_state_is_reduced_over_the_ranks_with_the_same_experts(self):
        """Eight ranks with all experts reduce all their gradients; with expert parallelism 8 those of the other weights."""
        one, eight = (
            self.parts(self.EXPERTS, **layout(dp=8, ep=size))["data parallel"].value for size in (1, 8)
        )
        assert eight < one / 5


def test_scoring_passes_multiply():
    assert score_time(case_of(passes=2)).total.value == pytest.approx(2 * score_time(case_of()).total.value)


def test_progress_takes_the_length_of_that_time():
    case = case_of(8_000.0)
    growing = replace(case, assumptions=replace(case.assumptions, response_start=2_000.0))
    assert update_time(growing, 0.5).total.value == pytest.approx(update_time(case.at(5_000.0)).total.value)


def test_a_precision_without_figures_is_refused():
    with pytest.raises(
        UserError, match="machine test has no figures for products in fp8_tensorwise, only for bfloat16"
    ):
        update_time(case_of(model__fp8="hybrid", model__fp8_recipe="tensorwise"))
