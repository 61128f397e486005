from dataclasses import replace

import pytest

from megatron_fipo.families.family import Experts
from megatron_fipo.families.qwen2 import QWEN2
from megatron_fipo.families.qwen3_moe import QWEN3_MOE
from megatron_fipo.plan.time.optimizer import largest_shard
from megatron_fipo.plan.time.transfers import LOADING, model_bytes, save_time, sync_time, write_time
from tests.plan.machines import MACHINE
from tests.plan.time.cases import SHAPE, case_of, layout


def test_model_bytes_are_those_of_the_weights():
    assert model_bytes(case_of()) == 2 * QWEN2.parameters(SHAPE)
    for dense_layers in ((), (0, 31)):
        routed = replace(SHAPE, experts=Experts(8, 2, 512, True, dense_layers))
        assert model_bytes(case_of(architecture=routed)) == 2 * QWEN3_MOE.parameters(routed)


class TestSync:
    def test_a_broadcast_passes_one_adapter_and_is_loaded(self):
        case = case_of(rollout__check_weight_sync=0, **layout(tp=8))
        size, seconds = model_bytes(case), sync_time(case)
        assert seconds.value == pytest.approx(size / MACHINE.network.rate.value + size / LOADING[0])
        assert seconds.not_calibrated == {"loading of weights by engines"}

    def test_later_stages_collect_beside_the_broadcast(self):
        """Three quarters of the bytes over the same adapter as the broadcast: nothing in addition."""
        one, four = (sync_time(case_of(**layout(tp=8, pp=pp))).value for pp in (1, 4))
        assert one == four

    def test_checksums_add_to_every_nth_push(self):
        never, tenth, every = (sync_time(case_of(rollout__check_weight_sync=n)).value for n in (0, 10, 1))
        assert tenth - never == pytest.approx((every - never) / 10)

    def test_colocated_engines_load_over_the_host_with_figures_that_are_not_measured(self):
        separate, colocated = (sync_time(case_of(rollout__placement=p)) for p in ("separate", "colocated"))
        assert colocated.value > separate.value
        assert {"copies in host memory", "checksums on the host"} <= colocated.not_calibrated

    def test_other_engines_use_the_object_store(self):
        assert (
            sync_time(case_of(rollout__engine="local")).value
            == sync_time(case_of(rollout__engine="local", rollout__placement="colocated")).value
        )


class TestSave:
    def test_ranks_copy_their_share_of_fourteen_bytes(self):
        """docs/checkpoints.md: 14 N / D bytes, for the recipe of Qwen2.5-32B 3.6 GB per rank."""
        case = case_of(**layout(tp=8, pp=4, cp=4))
        shard = largest_shard(case)
        assert save_time(case).value == pytest.approx(14 * shard.dense / 4 / MACHINE.host.rate.value)

    def test_experts_are_shared_by_the_ranks_that_have_the_same(self):
        """Of 8 ranks, 8 share the other weights and 2 each quarter of the experts: every rank writes an eighth of both."""
        routed = replace(SHAPE, experts=Experts(8, 2, 512, True))
        case = case_of(architecture=routed, **layout(dp=8, ep=4))
        expected = 14 * QWEN3_MOE.parameters(routed) / 8 / MACHINE.host.rate.value
        assert save_time(case).value == pytest.approx(expected)

    def test_writing_takes_the_nodes_disk(self):
        case = case_of(**layout(tp=8, pp=4, cp=4))
        assert write_time(case).value == pytest.approx(
            save_time(case).value * 8 * MACHINE.host.rate.value / MACHINE.disk.value
        )

    def test_a_synchronous_save_waits_for_the_disk(self):
        waits = save_time(case_of(checkpoint__asynchronous=False)).value
        assert waits == pytest.approx(save_time(case_of()).value + write_time(case_of()).value)
