"""The analysis of FutureKL on numbers whose result is known: by hand, by a formula, or by numpy's own functions."""

import json
from dataclasses import replace

import numpy as np
import pytest

from megatron_fipo.tasks.countdown.problems import CountdownProblem, Expression, attempt
from tests.tools.future_kl_steps import OBJECTIVE, drawn, mini_step
from tools.future_kl.analysis import analyse
from tools.future_kl.correlation import correlate, correlations, ranks
from tools.future_kl.countdown import NEXT, THIS, outcomes
from tools.future_kl.mismatch import correction_effect, shift
from tools.future_kl.noise import noise_floor
from tools.future_kl.render import render
from tools.future_kl.samplers import ENGINE
from tools.future_kl.spread import by_distance, spread
from tools.future_kl.tokens import DISTANCE, RELATIVE_POSITION, influence, next_mean, pooled, tokens_of

GAMMA = 2.0 ** (-1 / 8)
BOUNDS = (0.8, 1.2)


# -- tokens


def test_future_kl_of_a_response_by_hand():
    step = mini_step(np.array([[0.1, -0.2, 0.05]]))
    found = tokens_of(step, OBJECTIVE)
    later = [GAMMA * (-0.2 + GAMMA * 0.05), GAMMA * 0.05, 0.0]
    assert found.future_kl == pytest.approx(np.add([0.1, -0.2, 0.05], later))
    assert found.own == pytest.approx([0.1, -0.2, 0.05])
    assert found.influence == pytest.approx(np.exp(found.future_kl).clip(*BOUNDS))
    assert found.covariates[DISTANCE] == pytest.approx([2, 1, 0])
    assert found.covariates[RELATIVE_POSITION] == pytest.approx([0, 0.5, 1])


def test_a_filtered_token_adds_nothing_of_its_own():
    found = tokens_of(mini_step(np.array([[0.1, 3.0, 0.2]])), OBJECTIVE)  # e³ > 10
    assert found.own == pytest.approx([0.1, 0.0, 0.2])
    assert found.log_ratio == pytest.approx([0.1, 3.0, 0.2])


def test_the_gain_is_the_formula_and_counts_tool_tokens_as_distance_alone():
    n = np.arange(20, 0, -1)
    found = tokens_of(mini_step(np.zeros((1, 20))), OBJECTIVE)
    assert found.gain == pytest.approx((1 - GAMMA ** (2 * n)) / (1 - GAMMA**2))
    with_tool = tokens_of(mini_step(np.zeros((1, 3)), np.array([[True, False, True]])), OBJECTIVE)
    assert with_tool.gain == pytest.approx([1 + GAMMA**4, 1])
    assert with_tool.covariates[DISTANCE] == pytest.approx([2, 0])


def test_the_power_is_that_of_random_signs():
    sizes = np.abs(np.random.default_rng(3).standard_normal((1, 30)))
    signs = np.random.default_rng(4).choice([-1.0, 1.0], size=(20_000, 30))
    step = mini_step(1e-3 * sizes * signs)  # small: no token is filtered
    measured = np.square(influence(step, step.old_log_probs, OBJECTIVE).future_kl).mean(axis=0)
    assert tokens_of(mini_step(1e-3 * sizes), OBJECTIVE).power == pytest.approx(measured, rel=0.1)


def test_the_mean_of_the_next_tokens():
    values, mask = np.array([[1.0, 2.0, 4.0, 8.0]]), np.array([[True, True, False, True]])
    assert next_mean(values, mask, 2) == pytest.approx(np.array([[2.0, 8.0, 8.0, np.nan]]), nan_ok=True)


# -- spread


def test_shares_of_the_variance_add_up_and_match_their_definition():
    tokens = tokens_of(drawn((60, 40), 0.05), OBJECTIVE)
    found = spread(tokens, BOUNDS)
    assert found.own_share + found.later_share == pytest.approx(1)
    later = tokens.future_kl - tokens.own
    parts = (tokens.own.var() + later.var()) / tokens.future_kl.var()
    assert found.interaction == pytest.approx(1 - parts)
    assert found.own_share == pytest.approx(
        np.cov(tokens.own, tokens.future_kl, bias=True)[0, 1] / tokens.future_kl.var()
    )
    assert (found.at_low, found.at_high) == (
        np.mean(tokens.future_kl <= np.log(0.8)),
        np.mean(tokens.future_kl >= np.log(1.2)),
    )


def test_independent_log_ratios_have_the_spread_of_random_signs():
    tokens = tokens_of(drawn((400, 60), 0.05), OBJECTIVE)
    found = spread(tokens, BOUNDS)
    assert found.own_share == pytest.approx(found.own_share_of_random_signs, rel=0.05)
    assert found.own_share_of_random_signs == pytest.approx(1 - GAMMA**2, rel=0.2)
    bins = by_distance(tokens)
    assert sum(row.tokens for row in bins) == len(tokens)
    assert [(row.first, row.last) for row in bins[:4]] == [(1, 1), (2, 2), (3, 4), (5, 8)]
    assert bins[-1].last == 60
    for row in bins:
        assert row.future_kl_std == pytest.approx(row.std_of_random_signs, rel=0.15)
    assert bins[0].future_kl_std == pytest.approx(bins[0].log_ratio_std)


def test_log_ratios_that_go_together_are_beyond_random_signs():
    common = 0.05 * np.random.default_rng(1).standard_normal((200, 1)) * np.ones((200, 40))
    tokens = tokens_of(mini_step(common), OBJECTIVE)
    found = spread(tokens, BOUNDS)
    assert found.own_share < 0.7 * found.own_share_of_random_signs
    assert found.interaction > 0.1
    longest = by_distance(tokens)[-1]
    assert longest.future_kl_std > 2 * longest.std_of_random_signs


def test_a_constant_future_kl_has_no_shares():
    found = spread(tokens_of(mini_step(np.zeros((2, 5))), OBJECTIVE), BOUNDS)
    assert (found.own_share, found.later_share, found.interaction) == (None, None, None)


# -- correlations


def test_ranks_of_ties():
    assert ranks(np.array([5.0, 1.0, 5.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]


def test_a_correlation_is_numpys_and_its_interval_is_that_of_groups():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 50)
    common = np.repeat(rng.standard_normal((2, 40)), 50, axis=1)
    x, y = 3.0 + common + 0.1 * rng.standard_normal((2, 2_000))
    by_group, count = correlate(x, y, groups, seed=0)
    assert count == 40
    assert by_group.value == pytest.approx(np.corrcoef(x, y)[0, 1])
    by_token, _ = correlate(x, y, np.arange(2_000), seed=0)
    assert by_group.low < by_group.value < by_group.high
    # A group counts once, not 50 times: about sqrt(50) as wide.
    assert by_group.high - by_group.low == pytest.approx(
        np.sqrt(50) * (by_token.high - by_token.low), rel=0.35
    )
    assert correlate(x, y, groups, seed=0) == (by_group, count)


def test_correlations_that_are_not_defined():
    x, y = np.arange(4.0), np.array([1.0, 3.0, 2.0, 4.0])
    one_group, _ = correlate(x, y, np.zeros(4), seed=0)
    assert (one_group.low, one_group.high) == (None, None)
    assert one_group.value == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert correlate(x, np.ones(4), np.arange(4), seed=0)[0].value is None
    assert correlate(x[:0], y[:0], np.arange(0), seed=0)[0].value is None


def test_correlations_leave_out_undefined_tokens_and_separate_responses():
    step = drawn((20, 30), 0.05)
    flags = np.where(np.arange(30) < 10, np.nan, np.arange(30) % 2) * np.ones((20, 1))
    tokens = tokens_of(replace(step, outcomes={"flag": flags}), OBJECTIVE)
    found = {(row.responses, row.of, row.covariate): row for row in correlations(tokens, seed=0)}
    row = found["all", "F", "flag"]
    defined = ~np.isnan(tokens.covariates["flag"])
    assert row.tokens == defined.sum()
    assert row.pearson.value == pytest.approx(
        np.corrcoef(tokens.future_kl[defined], tokens.covariates["flag"][defined])[0, 1]
    )
    assert found["wrong", "F", "correctness"].pearson.value is None
    sizes = [found[responses, "f", "entropy"].tokens for responses in ("all", "wrong", "right")]
    assert sizes[0] == sizes[1] + sizes[2] == len(tokens)


# -- noise and other log-probs


def test_noise_in_the_old_log_probs_gives_future_kl_the_predicted_error():
    step = drawn((400, 60), 0.05)
    tokens = tokens_of(step, OBJECTIVE)
    floor = noise_floor([step], tokens, (1e-3, 3e-2), OBJECTIVE, seed=0)
    for noise in floor.by_sigma:
        assert noise.measured.error_std == pytest.approx(noise.predicted_std, rel=0.05)
        assert noise.measured.difference_std == pytest.approx(noise.sigma, rel=0.05)
    assert floor.by_sigma[0].measured.influence_correlation > floor.by_sigma[1].measured.influence_correlation
    at_critical = noise_floor([step], tokens, (floor.critical_sigma,), OBJECTIVE, seed=0).by_sigma[0]
    assert at_critical.measured.signal_to_noise == pytest.approx(1, rel=0.05)


def test_other_log_probs_shift_future_kl_by_the_sum_of_their_differences():
    step = mini_step(np.array([[0.01, -0.02, 0.03]]))
    same = shift([step], [step.old_log_probs], OBJECTIVE)
    assert (same.difference_max, same.error_std, same.moved, same.signal_to_noise) == (0, 0, 0, None)
    moved = shift([step], [step.old_log_probs - 0.015], OBJECTIVE)  # every Δ is 0.015 larger
    errors = [0.015 * (1 + GAMMA + GAMMA**2), 0.015 * (1 + GAMMA), 0.015]
    assert moved.error_std == pytest.approx(np.std(errors))
    assert moved.difference_mean_size == pytest.approx(0.015)
    assert moved.moved == pytest.approx(2 / 3)  # the last weight moves by 0.015


def test_the_factors_of_a_correction_by_hand():
    step = mini_step(np.zeros((1, 2)))
    sampled = step.old_log_probs - np.log([[0.5, 3.0]])  # w = 0.5 and 3
    found = correction_effect([step], [sampled], OBJECTIVE)
    assert (found.tis_mean, found.mis_mean, found.beyond_cap) == pytest.approx((1.25, 0.25, 0.5))
    assert found.effective_sample_size == pytest.approx(3.5**2 / (2 * 9.25))


# -- countdown


def test_attempts_that_reach_the_target():
    problem = CountdownProblem.parse("3,7,5=26")
    wrong = attempt(Expression(problem.numbers, ("+", "+")), 26)
    right = attempt(Expression(problem.numbers, ("*", "+")), 26)
    assert (wrong, right) == ("3+7=10+5=15-26=-11;", "3*7=21+5=26-26=0;")
    miscalculated = "3+7=21+5=26-26=0;"
    parts = [(wrong, 0, 0), (miscalculated, 0, 1), (right, 1, None), ("#3*7+5", None, None)]
    tokens = [*"".join(text for text, _, _ in parts), ""]  # the end of the sequence has no text
    found = outcomes("3,7,5=26:", tokens)
    for name, place in ((THIS, 1), (NEXT, 2)):
        expected = [np.nan if part[place] is None else part[place] for part in parts for _ in part[0]]
        assert found[name] == pytest.approx([*expected, np.nan], nan_ok=True)


def test_outcomes_are_undefined_without_a_problem_and_for_tokens_of_several_characters():
    for prompt, tokens in (("What is 1+1?", ["3", ";"]), ("3,7,5=26:", ["3*", ";"])):
        assert all(np.isnan(values).all() for values in outcomes(prompt, tokens).values())


# -- the result


def test_a_result_is_json_and_its_markdown_has_every_scope():
    steps = [
        drawn((8, 20), 0.05 * (number - 1), iteration=iteration, number=number, seed=iteration)
        for iteration in (3, 4)
        for number in (1, 2, 3)
    ]
    found = analyse(steps, OBJECTIVE, seed=0)
    scopes = ["mini-step 1", "mini-step 2", "mini-step 3", "mini-steps 2 to 3"]
    later = ["iteration 3, mini-steps 2 to 3", "iteration 4, mini-steps 2 to 3"]
    assert [row["scope"] for row in found["spread"]] == [*scopes, *later]
    everything = pooled([tokens_of(step, OBJECTIVE) for step in steps if step.number > 1])
    row = found["spread"][3]
    assert (row["tokens"], row["future_kl_std"]) == (len(everything), everything.future_kl.std())
    assert found["spread"][0]["future_kl_std"] == 0
    assert [(row["scope"], row["sampler"], row["iterations"]) for row in found["samplers"]] == [
        (scope, ENGINE, [3, 4]) for scope in scopes
    ]
    assert found["sigma_of_engine"] == pytest.approx(1e-3, rel=0.1)
    about = {
        "run": "runs/x",
        "iterations": [3, 4],
        "mini_steps": 3,
        "seed": 0,
        "level": 0.95,
        "resamples": 10,
    }
    settings = {"objective": {"half_life": 8.0, "influence_clip": [0.8, 1.2]}}
    text = json.dumps({**about, "settings": settings, "replay": [], **found}, allow_nan=False)
    page = render(json.loads(text))
    assert page.count("## ") == 8
    assert f"| mini-steps 2 to 3 | {len(everything):,} |" in page
    assert "nan" not in page
