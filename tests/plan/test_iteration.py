"""Phases put together by mode, with known phases, and the shipped 32B recipe in its fixed layout."""

from dataclasses import replace

import pytest

from megatron_fipo.plan.case import Case
from megatron_fipo.plan.estimate import Breakdown, Estimate, exact
from megatron_fipo.plan.iteration import Iteration, combine, iteration, run_time
from megatron_fipo.plan.workload import Assumptions
from tests.plan.cases import recipe_case

ASYNCHRONOUS = ("rollout.mode=fully_asynchronous", "rollout.unfinished=continue", "rollout.max_staleness=3")


def together(*overrides: str, rollout: float = 100.0, update: float = 40.0) -> Iteration:
    """Phases of round numbers: score 20, sync 5, an evaluation of 50 and a save of 10 every 5 iterations."""
    return combine(
        recipe_case("qwen2.5-32b", "evaluation.every=5", "checkpoint.every=5", *overrides),
        1.0,
        rollout=Breakdown({"decode": exact(rollout), "tail": exact(0.0)}),
        score=Breakdown({"products": exact(20.0)}),
        update=Breakdown({"products": exact(update), "bubble": exact(1e-9)}),
        sync=exact(5.0),
        evaluation=exact(50.0),
        save=exact(10.0),
    )


def test_synchronous_phases_follow_each_other():
    one = together()
    assert one.total.value == pytest.approx(100 + 20 + 40 + 5 + 10 + 2)
    assert one.trainer_idle == pytest.approx(1 - 60 / 177)
    assert one.engine_idle == pytest.approx(1 - 110 / 177)
    assert (one.staleness, one.binding) == (0.0, "rollout: decode")


@pytest.mark.parametrize(("rollout", "binding"), [(100.0, "rollout: decode"), (10.0, "update: products")])
def test_one_step_off_takes_the_longer_side(rollout, binding):
    one = together("rollout.mode=one_step_off", rollout=rollout)
    assert one.total.value == pytest.approx(max(rollout, 60) + 5 + 10 + 2)
    assert (one.staleness, one.binding) == (1.0, binding)


def test_fully_asynchronous_hides_weight_sync_and_saves_beside_the_rollout():
    one = together(*ASYNCHRONOUS)
    assert one.total.value == pytest.approx(100 + 10)
    assert together(*ASYNCHRONOUS, rollout=10.0).total.value == pytest.approx(60 + 5 + 10 + 2)
    assert 1.5 < one.staleness <= 3.0


def test_rates_count_all_gpus():
    one = together()
    case = recipe_case("qwen2.5-32b")
    assert one.devices == 128 + 64
    assert one.rate.value == pytest.approx(case.workload().trained_tokens / one.total.value / 192)
    assert one.generated_tokens == pytest.approx(20_480 * case.workload().response.mean)


def test_evaluation_every_0_is_once_per_run_and_left_out():
    assert together("evaluation.every=0").total.value == pytest.approx(together().total.value - 10)


def all_iterations(case: Case) -> Estimate:
    return run_time(case, iteration(case))


def grown(case: Case, start: float, end: float) -> Case:
    return replace(case, assumptions=Assumptions(response_start=start, response_end=end))


class TestRecipe:
    case = recipe_case("qwen2.5-32b")

    def test_engines_limit_the_layout_of_64_engine_gpus(self):
        one = iteration(self.case.at(9_500))
        assert one.binding == "rollout: decode"
        assert one.trainer_idle > 0.8
        assert one.total.low < one.total.value < one.total.high
        assert one.total.sources
        assert one.total.not_calibrated

    def test_time_grows_faster_than_length(self):
        short, long = (iteration(self.case.at(tokens)).total.value for tokens in (3_000, 9_000))
        assert long > 3 * short

    def test_the_run_integrates_over_the_growth_of_responses(self):
        constant = all_iterations(self.case.at(7_000)).value
        growing = all_iterations(grown(self.case, 4_000, 10_000)).value
        first, last = (all_iterations(self.case.at(tokens)).value for tokens in (4_000, 10_000))
        assert first < growing < last
        assert growing == pytest.approx(constant, rel=0.1)
        assert constant == pytest.approx(500 * iteration(self.case.at(7_000)).total.value)
