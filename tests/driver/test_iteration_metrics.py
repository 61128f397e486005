"""The numbers of an iteration against values worked out by hand."""

import pytest

from megatron_fipo.batching.trajectory import Trajectory, VersionSpan
from megatron_fipo.driver.iteration_metrics import rollout_values
from megatron_fipo.driver.rollout.collect_counts import CollectCounts
from megatron_fipo.driver.rollout.collector import Collected
from megatron_fipo.objective.metrics import over_mini_steps


def trajectory(
    spans: list[tuple[int, int]], reason: str = "stop", reward: float = 1.0, advantage: float = 0.5
) -> Trajectory:
    """From (version, tokens) of each span."""
    made, start = [], 0
    for version, tokens in spans:
        made.append(VersionSpan(version, start, start + tokens))
        start += tokens
    ids = list(range(start))
    return Trajectory(
        "g",
        [1],
        ids,
        [1] * start,
        [-0.1] * start,
        made,
        reason,
        reward,
        accuracy=max(reward, 0.0),
        advantage=advantage,
    )


def test_rollout_values():
    counts = CollectCounts(
        prompts=9,
        all_right=2,
        all_wrong=3,
        failed=1,
        unscored=7,
        stale=4,
        from_earlier=1,
        waiting=5,
        unfinished=6,
        generated_tokens=100,
        used_tokens=40,
        filtered_tokens=30,
        dropped_tokens=20,
        carried_tokens=10,
        unused_share=0.25,
    )
    trained = [
        trajectory([(7, 10)]),
        trajectory([(6, 5), (7, 5)], reason="length", reward=-1.0, advantage=-0.5),
        trajectory([(4, 10), (5, 5), (7, 5)], advantage=1.0),
    ]
    values = rollout_values(Collected([trained], counts), trained, version=7)
    expected = {
        "reward/mean": 1 / 3,
        "accuracy/mean": 2 / 3,
        "groups/used": 1,
        "groups/surplus": 5,
        "groups/unfinished": 6,
        "groups/from_earlier": 1,
        "groups/stale": 4,
        "groups/all_right": 2,
        "groups/all_wrong": 3,
        "groups/failed": 1,
        "groups/unscored": 7,
        "rollout/prompts": 9,
        "rollout/truncated": 1 / 3,
        "rollout/unused_share": 0.25,
        "tokens/generated": 100,
        "tokens/used": 40,
        "tokens/filtered": 30,
        "tokens/dropped": 20,
        "tokens/carried": 10,
        "length/min": 10,
        "length/q25": 10,
        "length/median": 10,
        "length/q75": 15,
        "length/max": 20,
        "length/mean": 40 / 3,
        "advantage/length_weighted": (5 - 5 + 20) / 40,
        "staleness/mean": (0 + 1 + 3) / 3,
        "staleness/max": 3,
        "staleness/tokens_age_0": 20 / 40,
        "staleness/tokens_age_1": 5 / 40,
        "staleness/tokens_older": 15 / 40,
    }
    assert values == pytest.approx(expected)


def test_mini_steps_become_one_number_per_statistic():
    steps = [
        {
            "policy/loss": 1.0,
            "influence/min": 0.9,
            "influence/max": 1.1,
            "policy/tokens": 10.0,
            "policy/sigma_log_ratio": 0.0,
        },
        {
            "policy/loss": 2.0,
            "influence/min": 0.8,
            "influence/max": 1.0,
            "policy/tokens": 30.0,
            "policy/sigma_log_ratio": 0.7,
        },
    ]
    assert over_mini_steps(steps) == {
        "policy/loss": 1.5,
        "influence/min": 0.8,
        "influence/max": 1.1,
        "policy/tokens": 40.0,
        "policy/sigma_log_ratio": 0.0,
    }
