from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.config import load_config
from megatron_fipo.errors import UserError
from megatron_fipo.plan.case import DEFAULT_EXPERT_LOAD, Case, case_of
from megatron_fipo.plan.workload import Assumptions, LengthLaw, Workload
from tests.plan.cases import EXAMPLES, recipe_case


@given(st.floats(0.01, 0.95), st.floats(0.0, 2.0), st.integers(100, 40_000))
def test_the_quantiles_have_the_mean_that_was_asked_for(share, spread, limit):
    law = LengthLaw(share * limit, spread, limit)
    assert max(law.quantiles) <= limit
    assert list(law.quantiles) == sorted(law.quantiles)
    assert sum(law.quantiles) / len(law.quantiles) == pytest.approx(law.mean, rel=0.03)
    assert law.second_moment >= (sum(law.quantiles) / len(law.quantiles)) ** 2 * 0.999


def test_the_law_is_that_of_random_lengths():
    law = LengthLaw(9_500.0, 0.7, 20_480)
    drawn = np.minimum(law.median * np.exp(np.random.default_rng(1).normal(0, 0.7, 400_000)), 20_480)
    assert drawn.mean() == pytest.approx(law.mean, rel=0.005)
    assert (drawn**2).mean() == pytest.approx(law.second_moment, rel=0.01)
    assert (drawn >= 20_480).mean() == pytest.approx(law.cut, abs=0.003)


@pytest.mark.parametrize("mean", [20_480.0, 20_479.9999])
def test_a_mean_at_the_limit_cuts_every_response(mean):
    law = LengthLaw(mean, 0.5, 20_480)
    assert law.cut == 1.0
    assert set(law.quantiles) == {20_480}


def test_moments_of_prompt_and_response_together():
    law = LengthLaw(100.0, 0.5, 1_000)
    work = Workload(prompt_tokens=20.0, response=law, informative=0.5, trained=8, sampled=16)
    lengths = np.asarray(law.quantiles) + 20.0
    assert work.mean_square == pytest.approx((lengths**2).mean(), rel=1e-2)
    assert work.trained_tokens == 8 * 120.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("informative", 0.0),
        ("informative", 1.5),
        ("evaluation_problems", 1_000_001),
        ("prompt_tokens", -1.0),
        ("response_end", 0.0),
    ],
)
def test_impossible_assumptions_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        Assumptions(**{name: value})


class TestDefaults:
    def test_a_prompt_is_no_longer_than_the_longest(self):
        assert recipe_case("qwen2.5-32b").workload().prompt_tokens == 160.0
        assert recipe_case("qwen2.5-32b", "rollout.max_prompt_length=100").workload().prompt_tokens == 100.0

    def test_an_iteration_samples_no_more_than_max_prompts(self):
        few = recipe_case(
            "qwen2.5-32b", "rollout.max_prompts=1024", assumptions=Assumptions(informative=0.25)
        )
        work = few.workload()
        assert (work.sampled, work.trained) == (1024 * 16, 256 * 16)

    def test_a_share_that_leaves_no_group_is_refused(self):
        for share in (1e-9, 5e-324):
            none = recipe_case("qwen2.5-32b", assumptions=Assumptions(informative=share))
            with pytest.raises(UserError, match=r"leaves no group to train on of rollout\.max_prompts=20480"):
                none.workload()

    def test_a_mean_above_its_limit_is_refused(self):
        short = recipe_case("qwen2.5-32b", assumptions=Assumptions(prompt_tokens=3_000))
        with pytest.raises(
            UserError, match=r"mean prompt of 3,000 tokens is above rollout.max_prompt_length=2048"
        ):
            short.workload()
        with pytest.raises(
            UserError, match=r"mean response of 30,000 tokens is above rollout.max_response_length"
        ):
            recipe_case("qwen2.5-32b").at(30_000).workload()

    def test_what_is_not_assumed_is_printed_with_its_default(self):
        case = recipe_case("qwen2.5-32b")
        resolved = case_of(case.config, case.family, case.architecture, case.machine, Assumptions())
        assert resolved.assumptions.prompt_tokens == 160.0
        assert resolved.assumptions.response_end == pytest.approx(0.45 * 20_480)

    def test_lengths_grow_linearly_over_training(self):
        case = recipe_case("qwen2.5-32b", assumptions=Assumptions(response_start=4_000, response_end=10_000))
        assert [case.workload(progress).response.mean for progress in (0.0, 0.5, 1.0)] == [
            4_000,
            7_000,
            10_000,
        ]

    def test_held_out_responses_are_those_of_the_sets_or_of_the_task(self):
        assumed = Assumptions(evaluation_problems=7)
        case = recipe_case("qwen2.5-32b", assumptions=assumed)
        assert case.held_out_samples == [32] * 2 * 7
        aime24 = replace(case.config.evaluation.sets["aime24"], samples_per_problem=4)
        sets = {**case.config.evaluation.sets, "aime24": aime24}
        assert case.changed(evaluation={"sets": sets}).held_out_samples == [4] * 7 + [32] * 7
        countdown = load_config(EXAMPLES / "countdown/fipo.yaml", [])
        assert replace(case, config=countdown).held_out_samples == [4] * countdown.data.evaluation_size


class TestExpertLoad:
    def test_it_is_resolved_for_a_model_with_experts_alone(self):
        dense, mixture = (recipe_case(name) for name in ("qwen2.5-32b", "qwen3-30b-a3b"))
        assert resolved(dense).assumptions.expert_load is None
        assert resolved(mixture).assumptions.expert_load == DEFAULT_EXPERT_LOAD == 1.2

    def test_an_assumption_is_kept(self):
        case = recipe_case("qwen3-30b-a3b", assumptions=Assumptions(expert_load=1.7))
        assert resolved(case).expert_load == case.expert_load == 1.7

    def test_a_load_below_the_mean_is_refused(self):
        with pytest.raises(ValueError, match="expert_load"):
            Assumptions(expert_load=0.9)


def resolved(case: Case) -> Case:
    return case_of(case.config, case.family, case.architecture, case.machine, case.assumptions)
