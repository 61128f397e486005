"""The search on small spaces, against a count of everything by hand, and what does not fit."""

from dataclasses import replace

import pytest

from megatron_fipo.config import load_config
from megatron_fipo.config.rules import validate
from megatron_fipo.errors import UserError
from megatron_fipo.families.registry import read_model_config
from megatron_fipo.plan.case import Case, case_of
from megatron_fipo.plan.fit import RECOMMENDED_SHARE, fullest_stage, misfits
from megatron_fipo.plan.iteration import iteration
from megatron_fipo.plan.machine_file import load_machine
from megatron_fipo.plan.memory.trainer import trainer_memory
from megatron_fipo.plan.render_search import layout_text
from megatron_fipo.plan.search import changes, nearest_fit, search
from megatron_fipo.plan.time.trainer import score_time, update_time
from megatron_fipo.plan.workload import Assumptions
from tests.plan.cases import EXAMPLES, recipe_case
from tests.plan.machines import toy_machine

GIB = 2**30


@pytest.fixture(scope="module")
def seven_b() -> Case:
    return recipe_case("qwen2.5-7b-math")


@pytest.fixture(scope="module")
def found(seven_b):
    return search(seven_b, 8)


class TestFound:
    def test_every_layout_is_valid_fits_and_uses_all_gpus(self, found):
        assert found
        for result in found:
            validate(result.case.config, result.case.architecture)
            assert result.case.devices == 8
            assert not misfits(result.case)
            assert result.memory.total.value <= RECOMMENDED_SHARE * result.case.machine.device_bytes

    def test_they_are_ranked_by_the_rate_of_the_complete_iteration(self, found):
        rates = [result.iteration.rate.value for result in found]
        assert rates == sorted(rates, reverse=True)
        best = found[0]
        assert iteration(best.case).rate.value == pytest.approx(best.iteration.rate.value)

    def test_no_neighbor_of_the_fastest_synchronous_layout_is_faster(self, found):
        """One step in each size that keeps the number of trainer GPUs."""
        best = next(result for result in found if result.case.config.rollout.mode == "synchronous").case
        best_seconds = score_time(best).total.value + update_time(best).total.value
        parallel = best.config.parallel
        for name in ("tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size"):
            changed = replace(
                parallel,
                **{name: 2 * getattr(parallel, name)},
                data_parallel_size=parallel.data_parallel_size // 2,
            )
            changed = replace(changed, sequence_parallel=changed.tensor_model_parallel_size > 1)
            if changed.data_parallel_size == 0:
                continue
            neighbor = replace(best, config=replace(best.config, parallel=changed))
            try:
                validate(neighbor.config, neighbor.architecture)
            except UserError:
                continue
            seconds = score_time(neighbor).total.value + update_time(neighbor).total.value
            assert seconds >= 0.97 * best_seconds, name

    def test_every_mode_has_the_settings_it_needs(self, found):
        by_mode = {result.case.config.rollout.mode: result.case.config.rollout for result in found}
        assert set(by_mode) == {"synchronous", "one_step_off", "fully_asynchronous"}
        assert by_mode["fully_asynchronous"].unfinished == "continue"
        assert by_mode["one_step_off"].max_staleness >= 1


def test_recomputation_is_the_least_that_fits(seven_b):
    """On smaller GPUs layouts recompute, and none of those fits without."""
    small = replace(seven_b, machine=toy_machine(device_bytes=48 * GIB))
    full = [
        result.case
        for result in search(small, 8, ["synchronous"])
        if result.case.config.model.recompute == "full"
    ]
    assert full
    for case in full:
        without = replace(
            case, config=replace(case.config, model=replace(case.config.model, recompute="none"))
        )
        assert fullest_stage(without)[1].total.value > RECOMMENDED_SHARE * 48 * GIB


def test_nothing_fits_on_gpus_that_hold_no_state(seven_b):
    assert search(replace(seven_b, machine=toy_machine(device_bytes=6 * GIB)), 8) == []


def test_a_search_on_more_gpus_than_a_batch_needs_ends_at_once(seven_b):
    assert search(seven_b, 10**15) == []


def test_a_search_needs_a_gpu(seven_b):
    with pytest.raises(UserError, match="at least 1 GPU, not 0"):
        search(seven_b, 0)


def test_a_search_over_several_nodes_uses_complete_ones(seven_b):
    with pytest.raises(UserError, match="needs a multiple of 8 GPUs, not 127"):
        search(seven_b, 127)


class TestExperts:
    """The recipe of Qwen3-30B-A3B."""

    @pytest.fixture(scope="class")
    def mixture(self) -> Case:
        config = load_config(EXAMPLES / "qwen3-30b-a3b/fipo.yaml", [])
        model = read_model_config(EXAMPLES / "qwen3-30b-a3b")
        lengths = Assumptions(response_start=4_000, response_end=10_000)
        return case_of(config, *model, load_machine("h100-80gb"), lengths)

    @pytest.fixture(scope="class")
    def found(self, mixture: Case):
        return search(mixture, 32, ["synchronous"])

    def test_every_layout_is_one_that_the_rules_allow(self, found):
        assert found
        for result in found:
            parallel = result.case.config.parallel
            validate(result.case.config, result.case.architecture)
            assert 128 % parallel.expert_model_parallel_size == 0
            assert parallel.stage_size % parallel.expert_model_parallel_size == 0
            assert parallel.sequence_parallel == (parallel.tensor_model_parallel_size > 1)
            assert parallel.expert_tensor_parallel_size == 1

    def test_the_recipe_is_the_fastest_layout(self, mixture, found):
        """Its experts are shared within a node, so that no token leaves it."""
        assert changes(mixture, found[0].case) == {}
        assert mixture.config.parallel.expert_model_parallel_size == 8

    def test_no_other_size_is_faster(self, found):
        best = found[0].case
        seconds = score_time(best).total.value + update_time(best).total.value
        for size in (1, 2, 4, 8, 16):
            other = best.changed(parallel={"expert_model_parallel_size": size})
            try:
                validate(other.config, other.architecture)
            except UserError:
                continue
            fits = fullest_stage(other)[1].total.value <= RECOMMENDED_SHARE * other.machine.device_bytes
            if fits:
                assert score_time(other).total.value + update_time(other).total.value >= 0.97 * seconds

    def test_a_dense_model_has_no_expert_layouts(self, seven_b):
        for result in search(seven_b, 8, ["synchronous"]):
            assert result.case.config.parallel.expert_model_parallel_size == 1

    def test_the_nearest_layout_that_fits_may_change_the_expert_ranks(self):
        whole = recipe_case("qwen3-30b-a3b", "parallel.expert_model_parallel_size=1")
        assert misfits(whole)[0].fatal
        nearest = nearest_fit(whole)
        assert nearest is not None
        assert set(nearest) == {"parallel.expert_model_parallel_size"}

    def test_a_layout_is_written_with_its_expert_ranks(self, mixture):
        assert layout_text(mixture) == "TP1 CP2 PP2x4 DP4 EP8 full"
        shared = mixture.changed(parallel={"expert_model_parallel_size": 4, "expert_tensor_parallel_size": 2})
        assert layout_text(shared) == "TP1 CP2 PP2x4 DP4 EP4 ETP2 full"


class TestMisfits:
    def test_the_largest_part_of_the_trainer_is_named(self):
        case = recipe_case("qwen2.5-32b", "model.recompute=none", machine=toy_machine(device_bytes=30 * GIB))
        trainer = misfits(case)[0]
        assert trainer.fatal
        assert trainer.reason.startswith("a trainer rank of stage 0 needs 3")
        assert "(activations 19" in trainer.reason

    def test_the_nearest_layout_that_fits_changes_one_setting(self):
        case = recipe_case("qwen2.5-32b", "model.recompute=none", machine=toy_machine(device_bytes=30 * GIB))
        nearest = nearest_fit(case)
        assert nearest is not None
        assert len(nearest) == 1
        fitting = recipe_case(
            "qwen2.5-32b", "model.recompute=none", *(f"{key}={value}" for key, value in nearest.items())
        )
        assert fullest_stage(fitting)[1].total.value < 27 * GIB

    def test_above_nine_tenths_is_a_warning(self):
        used = trainer_memory(recipe_case("qwen2.5-32b"), 0).total.value
        (trainer,) = misfits(recipe_case("qwen2.5-32b", machine=toy_machine(device_bytes=int(used / 0.95))))[
            :1
        ]
        assert not trainer.fatal

    def test_an_engine_must_hold_the_longest_response(self):
        reasons = [
            misfit.reason
            for misfit in misfits(recipe_case("qwen2.5-32b", "rollout.engine_tensor_parallel_size=1"))
            if misfit.fatal
        ]
        assert len(reasons) == 1
        assert "fewer than the longest prompt and response of 22,528" in reasons[0]
        assert "raise rollout.engine_tensor_parallel_size" in reasons[0]

    def test_a_colocated_engine_gets_what_the_trainer_leaves(self):
        overrides = ("rollout.placement=colocated", "rollout.gpu_memory_share=0.95")
        (engine,) = misfits(recipe_case("qwen2.5-7b-math", *overrides))
        assert engine.fatal
        share = float(engine.reason.split()[-1])
        assert "rollout.gpu_memory_share=0.95 is not free beside a trainer rank" in engine.reason
        fitting = recipe_case("qwen2.5-7b-math", overrides[0], f"rollout.gpu_memory_share={share}")
        assert not misfits(fitting)

    def test_host_memory_is_a_warning(self):
        case = recipe_case("qwen2.5-32b", machine=toy_machine(host_bytes=10 * GIB))
        (host,) = misfits(case)
        assert not host.fatal
        assert host.reason.startswith("a node needs ")

    def test_the_fullest_stage_is_that_of_all(self):
        for overrides in (
            (),
            ("parallel.virtual_pipeline_model_parallel_size=2",),
            ("model.recompute=none",),
        ):
            case = recipe_case("qwen2.5-32b", *overrides)
            totals = [trainer_memory(case, stage).total.value for stage in range(4)]
            assert fullest_stage(case)[1].total.value == max(totals)


def test_changes_name_what_differs(seven_b):
    config = replace(seven_b.config, model=replace(seven_b.config.model, recompute="full"))
    assert changes(seven_b, replace(seven_b, config=config)) == {"model.recompute": "full"}
