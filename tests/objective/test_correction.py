"""Off-policy correction: what it multiplies, what it leaves alone, and what is reported of the rollout engine."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.objective.config import ObjectiveConfig
from megatron_fipo.objective.loss import policy_loss
from megatron_fipo.objective.loss_inputs import PolicyLoss, PolicyRows
from tests.objective.packed import packed_rows, random_responses, zigzag
from tests.ranks import run_ranks

CORRECTIONS = ("tis", "mis")
FIPO = ObjectiveConfig(influence_clip=(0.8, 1.2))


def factor(difference: float, correction: str, cap: float) -> float:
    weight = math.exp(difference)
    return min(weight, cap) if correction == "tis" else weight * (weight <= cap)


def one_response(differences: list[float], dtype: torch.dtype = torch.float64) -> PolicyRows:
    """One response whose old log-probs are `differences` above the engine's."""
    members = random_responses(0, [len(differences)])
    members[0].mask[:] = 1
    rows, _ = packed_rows(members, [0], zigzag([len(differences)], 1), 0)
    rows = replace(
        rows, rollout_log_probs=rows.old_log_probs - torch.tensor(differences, dtype=torch.float64)
    )
    names = (
        "old_log_probs",
        "advantages",
        "last_row",
        "response_length",
        "reference_log_probs",
        "rollout_log_probs",
    )
    return replace(rows, **{name: getattr(rows, name).to(dtype) for name in names})


def step(rows: PolicyRows, objective: ObjectiveConfig, shift: float = 0.1) -> tuple[PolicyLoss, torch.Tensor]:
    """Loss and gradient if each new log-prob is `shift` above the old one."""
    log_probs = (rows.old_log_probs.nan_to_num() + shift).requires_grad_()
    result = policy_loss(log_probs, None, rows, objective)
    result.loss_sum.backward()
    assert log_probs.grad is not None
    return result, log_probs.grad


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_by_hand(correction) -> None:
    """Advantage 1, ratio 1: each token's gradient is minus its factor. w of 1/2, 1, 2 (the cap itself), 3."""
    rows = one_response([-math.log(2), 0.0, math.log(2) - 1e-12, math.log(3)])
    rows = replace(rows, advantages=torch.ones(4, dtype=torch.float64))
    result, gradient = step(
        rows, ObjectiveConfig(name="dapo", correction=correction, correction_cap=2.0), shift=0.0
    )
    beyond = {"tis": 2.0, "mis": 0.0}[correction]
    assert gradient.tolist() == pytest.approx([-0.5, -1.0, -2.0, -beyond])
    assert result.loss_sum.item() == pytest.approx(-3.5 - beyond)
    assert result.normalizer == 4


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-25, 25), min_size=1, max_size=20),
    st.sampled_from(CORRECTIONS),
    st.sampled_from([0.5, 1.0, 2.0, math.inf]),
    st.sampled_from(["fipo", "dapo", "grpo"]),
)
def test_every_token_is_weighed_and_nothing_else_changes(differences, correction, cap, name) -> None:
    """Gradients times the factor; FutureKL, influence weights, kept tokens and the denominator bit for bit as without."""
    rows = one_response(differences)
    plain, gradient = step(rows, replace(FIPO, name=name))
    corrected, found = step(rows, replace(FIPO, name=name, correction=correction, correction_cap=cap))
    # What was rounded away between log-probs is not the correction's doing.
    rounded = (rows.old_log_probs - rows.rollout_log_probs).tolist()
    factors = [factor(min(max(d, -20.0), 20.0), correction, cap) for d in rounded]
    np.testing.assert_allclose(found, gradient.numpy() * factors, rtol=1e-12)
    for field in ("future_kl", "influence_weights", "kept", "normalizer"):
        assert torch.equal(getattr(corrected, field), getattr(plain, field))
    assert found.isfinite().all()


def test_without_correction_the_engine_changes_no_bit_of_the_loss() -> None:
    """Whether its log-probs are missing, there, or broken."""
    known = one_response([0.3, -2.0, 5.0, 0.0], torch.float32)
    broken = replace(known, rollout_log_probs=torch.tensor([math.nan, math.inf, -math.inf, -1e38]))
    (plain, gradient), *others = (
        step(rows, FIPO)
        for rows in (
            replace(known, rollout_log_probs=None),
            known,
            broken,
            replace(known, rollout_log_probs=None),
        )
    )
    own = {
        name: value for name, value in plain.statistics.finalize().items() if not name.startswith("rollout/")
    }
    for result, found in others:
        assert torch.equal(result.loss_sum, plain.loss_sum)
        assert torch.equal(found, gradient)
        statistics = result.statistics.finalize()
        assert {name: statistics[name] for name in own} == own
        assert all(math.isfinite(value) for value in statistics.values())


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_masked_tokens_of_the_engine_are_ignored(correction) -> None:
    """A tool's tokens have no log-prob of the engine; any value there counts nowhere."""
    objective = replace(FIPO, correction=correction)
    rows = replace(one_response([0.5, 0.0, 1.0, -0.5]), mask=torch.tensor([True, False, True, True]))
    clean, gradient = step(rows, objective)
    for value in (math.nan, -math.inf, 1e30):
        engine = torch.where(rows.mask, rows.rollout_log_probs, value)
        result, found = step(replace(rows, rollout_log_probs=engine), objective)
        assert torch.equal(found, gradient)
        assert found[1] == 0
        assert result.statistics.finalize() == clean.statistics.finalize()
        assert result.statistics.finalize()["rollout/compared_tokens"] == 3
        assert result.normalizer == 3


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_a_broken_log_prob_of_the_engine_takes_out_its_response_only(correction) -> None:
    members = random_responses(1, [20, 9])
    rows, origin = packed_rows(members, [0, 0], zigzag([20, 9], 1), 0)
    engine = rows.rollout_log_probs.clone()
    engine[3] = math.nan
    result, gradient = step(replace(rows, rollout_log_probs=engine), replace(FIPO, correction=correction))
    alone = [sequence == 1 for sequence, _ in origin]
    assert result.kept.bool().tolist() == alone
    assert not gradient[~torch.tensor(alone)].any()
    assert gradient[torch.tensor(alone)].isfinite().all()
    statistics = result.statistics.finalize()
    assert statistics["policy/nonfinite_sequences"] == 1
    assert statistics["rollout/compared_tokens"] == sum(alone)
    assert statistics["policy/kept_tokens"] == sum(alone)


def test_tokens_left_out_by_the_mask_still_count() -> None:
    """All weights beyond the cap: `mis` has loss 0 and gradient 0 over the same number of tokens."""
    result, gradient = step(one_response([1.0, 2.0, 3.0]), replace(FIPO, correction="mis"))
    assert result.loss_sum == 0
    assert not gradient.any()
    assert result.normalizer == 3
    assert result.statistics.finalize()["policy/loss"] == 0


def expected_statistics(differences: np.ndarray, cap: float) -> dict[str, float]:
    """The definitions, in numpy."""
    weights = np.exp(np.clip(differences, -20, 20))
    return {
        "rollout/compared_tokens": len(differences),
        "rollout/log_prob_difference": np.abs(differences).mean(),
        "rollout/log_prob_difference_max": np.abs(differences).max(),
        "rollout/kl": -differences.mean(),
        "rollout/kl_k3": (weights - np.clip(differences, -20, 20) - 1).mean(),
        "rollout/effective_sample_size": weights.sum() ** 2 / (len(weights) * (weights**2).sum()),
        "rollout/capped_fraction": (weights > cap).mean(),
    }


def _engine_statistics(rank: int, world_size: int) -> dict[str, float]:
    members = random_responses(7, [50, 3, 200])
    group = dist.group.WORLD if world_size > 1 else None
    total = None
    for batch in (members[:2], members[2:]):
        rows, _ = packed_rows(batch, [0] * len(batch), zigzag([len(r.mask) for r in batch], world_size), rank)
        found = policy_loss(
            rows.old_log_probs + 0.1, None, rows, replace(FIPO, correction_cap=1.5), group
        ).statistics
        total = found if total is None else total.merge(found)
    assert total is not None
    return total.reduce(group).finalize()


@pytest.mark.parametrize("cp", [1, 2])
def test_statistics_are_their_definitions_however_the_tokens_are_spread(cp) -> None:
    """Over micro-batches and ranks, with no correction in force."""
    members = random_responses(7, [50, 3, 200])
    differences = np.concatenate(
        [(r.old_log_probs - r.rollout_log_probs)[r.mask.bool()].numpy() for r in members]
    )
    expected = expected_statistics(differences, 1.5)
    assert 0.1 < expected["rollout/capped_fraction"] < 0.5
    for found in run_ranks(cp, _engine_statistics):
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-12)


def test_statistics_at_the_ends() -> None:
    """An engine that agrees; one that is wildly off; small differences in float32, where e^δ − δ − 1 would cancel."""
    agree = step(one_response([0.0] * 5), FIPO)[0].statistics.finalize()
    names = (
        "log_prob_difference",
        "log_prob_difference_max",
        "kl",
        "kl_k3",
        "capped_fraction",
        "effective_sample_size",
    )
    assert [agree[f"rollout/{name}"] for name in names] == [0, 0, 0, 0, 0, 1]
    off = step(one_response([100.0, -100.0]), FIPO)[0].statistics.finalize()
    assert off["rollout/log_prob_difference_max"] == pytest.approx(100)
    assert off["rollout/effective_sample_size"] == pytest.approx(0.5)
    assert off["rollout/kl_k3"] == pytest.approx((math.exp(20) - 21 + 19) / 2)
    small = step(one_response([1e-3, -1e-3], torch.float32), FIPO)[0].statistics.finalize()
    assert small["rollout/kl_k3"] == pytest.approx(5e-7, rel=1e-2)
