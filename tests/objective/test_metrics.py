"""Statistics do not depend on how tokens are distributed, and mean what their names state."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_fipo.objective.config import ObjectiveConfig
from megatron_fipo.objective.loss import policy_loss
from megatron_fipo.objective.loss_inputs import PolicyRows
from megatron_fipo.objective.metrics import MAXIMA, METRICS, SUMS, Totals, markdown_table, over_mini_steps
from megatron_fipo.objective.statistics import Statistics
from tests.objective.packed import packed_rows, random_responses, zigzag
from tests.ranks import run_ranks


def hand_made() -> tuple[torch.Tensor, PolicyRows]:
    """Two sequences of two tokens: advantage 1 with ratios 2 and 1, advantage −1 with ratios 0.5 and 1."""
    members = random_responses(0, [2, 2])
    for member in members:
        member.mask[:] = 1
    rows, _ = packed_rows(members, [0, 0], zigzag([2, 2], 1), 0)
    ratios = torch.tensor([2.0, 1.0, 0.5, 1.0], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    rows = replace(rows, advantages=advantages, reference_log_probs=None, rollout_log_probs=None)
    return rows.old_log_probs + ratios.log(), rows


def test_values_by_hand() -> None:
    log_probs, rows = hand_made()
    entropy = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    config = ObjectiveConfig(half_life=1.0, influence_clip=(0.8, 1.2))
    found = policy_loss(log_probs, entropy, rows, replace(config, name="fipo")).statistics.finalize()
    two = math.log(2)
    # F = (ln 2, 0, -ln 2, 0), e^F = (2, 1, 0.5, 1), f = (1.2, 1, 0.8, 1)
    loss = (-1.2 * 1.28 - 1.0 + 0.8 * 0.8 + 1.0) / 4
    expected = {
        "policy/loss": loss,
        "policy/loss_token_mean": loss,
        "policy/loss_reference_micro_batch": loss,
        "policy/normalization_gap": 0.0,
        "policy/kl": 0.0,
        "policy/sigma_log_ratio": two / math.sqrt(2),
        "policy/entropy": 2.5,
        "policy/clip_fraction_high": 0.25,
        "policy/clip_fraction_low": 0.25,
        "policy/dual_clip_fraction": 0.0,
        "policy/sequences": 2,
        "policy/dropped_sequences": 0,
        "policy/nonfinite_sequences": 0,
        "policy/tokens": 4,
        "policy/kept_tokens": 4,
        "policy/reference_kl": 0.0,
        "influence/mean": 1.0,
        "influence/min": 0.8,
        "influence/max": 1.2,
        "influence/share_at_low": 0.25,
        "influence/share_at_high": 0.25,
        "influence/raw_mean": 4.5 / 4,
    }
    engine = {name: value for name, value in found.items() if name.startswith("rollout/")}
    assert set(engine.values()) == {0.0}
    assert {name: value for name, value in found.items() if name not in engine} == pytest.approx(
        expected, abs=1e-12
    )


def test_normalization_gap_shows_what_the_packing_did() -> None:
    """Micro-batches of 8 and 72 tokens: the release weights them by sequences, the token mean by tokens."""
    members = random_responses(1, [8, 72])
    config, total = ObjectiveConfig(), Statistics.empty()
    losses = {}
    for normalization in ("token_mean", "reference_micro_batch"):
        total = Statistics.empty()
        for member in members:
            rows, _ = packed_rows([member], [0], zigzag([len(member.mask)], 1), 0)
            log_probs = member.log_probs.detach()[member.mask.bool()]
            objective = replace(config, name="fipo", normalization=normalization)
            total = total.merge(policy_loss(log_probs, None, rows, objective).statistics)
        losses[normalization] = total.finalize()
    a, b = (losses[name]["policy/loss"] for name in losses)
    for found in losses.values():
        assert found["policy/loss_token_mean"] == pytest.approx(a)
        assert found["policy/loss_reference_micro_batch"] == pytest.approx(b)
        assert found["policy/normalization_gap"] == pytest.approx(abs(a - b) / max(abs(a), abs(b)))
        assert abs(a - b) > 1e-3


def test_overflowing_influence_keeps_the_raw_mean_finite() -> None:
    """No decay and many positive log-ratios: e^F is beyond float32, the report is not."""
    members = random_responses(1, [400])
    rows, _ = packed_rows(members, [0], zigzag([400], 1), 0)
    rows = replace(
        rows, **{n: getattr(rows, n).float() for n in ("old_log_probs", "advantages", "reference_log_probs")}
    )
    result = policy_loss(rows.old_log_probs + 2.0, None, rows, ObjectiveConfig(half_life=math.inf))
    assert result.future_kl.exp().isinf().any()
    found = result.statistics.finalize()
    assert all(math.isfinite(value) for value in found.values())
    assert found["influence/raw_mean"] <= math.exp(20) * 1.0001


def test_empty_is_neutral_and_means_over_nothing_are_zero() -> None:
    log_probs, rows = hand_made()
    some = policy_loss(log_probs, None, rows, ObjectiveConfig()).statistics
    assert Statistics.empty().merge(some).finalize() == some.finalize()
    assert set(Statistics.empty().finalize().values()) == {0.0}


def _reduce(rank: int, world_size: int) -> tuple[dict, list[str]]:
    log_probs, rows = hand_made()
    statistics = policy_loss(log_probs - 0.1 * rank, None, rows, ObjectiveConfig()).statistics
    calls: list[str] = []
    original = dist.all_reduce

    def counted(*args, **kwargs):
        calls.append("all_reduce")
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted)
        reduced = statistics.reduce(dist.group.WORLD)
    return reduced.finalize(), calls


def test_reduce_is_merge_by_two_all_reduces() -> None:
    log_probs, rows = hand_made()
    parts = [
        policy_loss(log_probs - 0.1 * rank, None, rows, ObjectiveConfig()).statistics for rank in range(3)
    ]
    expected = parts[0].merge(parts[1]).merge(parts[2]).finalize()
    for found, calls in run_ranks(3, _reduce):
        assert found == pytest.approx(expected, abs=1e-12)
        assert calls == ["all_reduce", "all_reduce"]


def test_the_table_of_the_docs_is_the_list() -> None:
    page = (Path(__file__).parents[2] / "docs" / "algorithm.md").read_text()
    assert markdown_table() in page, "docs/algorithm.md is out of date: python -m tools.metrics_table"


def test_every_sum_is_reported_and_every_name_is_unique() -> None:
    used: set[str] = set()

    class Recording(Totals):
        def __getitem__(self, name: str) -> torch.Tensor:
            used.add(name)
            return super().__getitem__(name)

    totals = Recording({name: torch.ones((), dtype=torch.float64) for name in (*SUMS, *MAXIMA)})
    for metric in METRICS:
        if metric.value is not None:
            metric.value(totals)
    assert used == {*SUMS, *MAXIMA}
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_mini_steps_reduce_as_listed_and_an_unknown_name_is_refused() -> None:
    steps = [{metric.name: value for metric in METRICS} for value in (3.0, 1.0, 2.0)]
    found = over_mini_steps(steps)
    assert found["policy/loss"] == 2.0  # mean
    assert found["policy/tokens"] == found["policy/skipped_steps"] == 6.0  # sum
    assert found["influence/min"] == 1.0
    assert found["influence/max"] == 3.0
    assert found["policy/sigma_log_ratio"] == 3.0  # of the first mini-step
    with pytest.raises(KeyError, match="policy/new"):
        over_mini_steps([{"policy/new": 1.0}])
