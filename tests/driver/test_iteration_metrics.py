"""The numbers of an iteration against values worked out by hand."""

import pytest

from megatron_fipo.batching.trajectory import Trajectory, VersionSpan
from megatron_fipo.driver.iteration_metrics import rollout_values, set_values
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


def test_each_set_has_its_share_accuracy_reward_and_length():
    trained = [trajectory([(0, tokens)], reward=reward) for tokens, reward in ((4, 1.0), (8, -1.0), (6, 1.0))]
    assert set_values(trained, ["a", "b"]) == {}
    for member, name in zip(trained, "aab", strict=True):
        member.set_name = name
    assert set_values(trained, ["a", "b", "c"]) == {
        "set/a/share": 2 / 3,
        "set/a/accuracy": 0.5,
        "set/a/reward": 0.0,
        "set/a/length": 6.0,
        "set/b/share": 1 / 3,
        "set/b/accuracy": 1.0,
        "set/b/reward": 1.0,
        "set/b/length": 6.0,
        "set/c/share": 0.0,
    }


def test_numbers_that_rewards_name_are_means_over_the_responses_that_have_them():
    first, second, third = (trajectory([(0, 2)]) for _ in range(3))
    first.extra = {"problem_id": "p", "answer": "3", "format": 1, "tests": 0.5}
    second.extra = {"problem_id": "p", "answer": "3", "format": 0, "steps": [1, 2]}
    values = rollout_values(
        Collected([[first, second, third]], CollectCounts(prompts=1)), [first, second, third], 1
    )
    numbers = {name: value for name, value in values.items() if name.startswith("reward/")}
    assert numbers == {"reward/mean": 1.0, "reward/format": 0.5, "reward/tests": 0.5}
