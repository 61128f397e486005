"""Metrics of one iteration's rollout: dynamic sampling, lengths, sets, staleness. Pure. The loss's are in objective/metrics.py."""

from collections.abc import Iterable, Sequence

import numpy as np

from megatron_fipo.batching.trajectory import Trajectory
from megatron_fipo.driver.rollout.collector import Collected
from megatron_fipo.tasks.named_numbers import means


def rollout_values(collected: Collected, trained: Sequence[Trajectory], version: int) -> dict[str, float]:
    """Metrics of dynamic sampling and of the responses trained on by an update of weights `version`."""
    counts = collected.counts
    lengths = np.array([trajectory.sampled_tokens for trajectory in trained], dtype=float)
    advantages = np.array([trajectory.advantage for trajectory in trained])
    quartiles = np.percentile(lengths, [0, 25, 50, 75, 100])
    return {
        "reward/mean": float(np.mean([trajectory.reward for trajectory in trained])),
        **{
            f"reward/{name}": mean for name, mean in means(trajectory.extra for trajectory in trained).items()
        },
        "accuracy/mean": float(np.mean([trajectory.accuracy for trajectory in trained])),
        "groups/used": float(len(collected.groups)),
        "groups/surplus": float(counts.waiting),
        "groups/unfinished": float(counts.unfinished),
        "groups/from_earlier": float(counts.from_earlier),
        "groups/stale": float(counts.stale),
        "groups/all_right": float(counts.all_right),
        "groups/all_wrong": float(counts.all_wrong),
        "groups/failed": float(counts.failed),
        "groups/unscored": float(counts.unscored),
        "rollout/prompts": float(counts.prompts),
        "rollout/truncated": float(np.mean([trajectory.finish_reason == "length" for trajectory in trained])),
        "rollout/unused_share": counts.unused_share,
        "tokens/generated": float(counts.generated_tokens),
        "tokens/used": float(counts.used_tokens),
        "tokens/filtered": float(counts.filtered_tokens),
        "tokens/dropped": float(counts.dropped_tokens),
        "tokens/carried": float(counts.carried_tokens),
        **dict(
            zip(
                ("length/min", "length/q25", "length/median", "length/q75", "length/max"),
                map(float, quartiles),
                strict=True,
            )
        ),
        "length/mean": float(lengths.mean()),
        "advantage/length_weighted": float((advantages * lengths).sum() / lengths.sum()),
        **staleness_values(trained, version),
        **environment_values(trained),
    }


def environment_values(trained: Sequence[Trajectory]) -> dict[str, float]:
    """Turns and tokens of environments; nothing if there were none."""
    observed = sum(trajectory.response_length - trajectory.sampled_tokens for trajectory in trained)
    if not observed:
        return {}
    return {
        "environment/turns": float(np.mean([trajectory.turns for trajectory in trained])),
        "environment/observation_tokens": float(observed),
    }


def set_values(trained: Sequence[Trajectory], sets: Iterable[str]) -> dict[str, float]:
    """Metrics of each set of `data.sets`, over the responses trained on; of one without any its share alone, 0.

    Empty for responses of no set. The share of responses is that of groups, which are equally large.
    """
    values: dict[str, float] = {}
    for name in sets if any(trajectory.set_name for trajectory in trained) else ():
        of_set = [trajectory for trajectory in trained if trajectory.set_name == name]
        values[f"set/{name}/share"] = len(of_set) / len(trained)
        if of_set:
            values |= {
                f"set/{name}/accuracy": float(np.mean([trajectory.accuracy for trajectory in of_set])),
                f"set/{name}/reward": float(np.mean([trajectory.reward for trajectory in of_set])),
                f"set/{name}/length": float(np.mean([trajectory.response_length for trajectory in of_set])),
            }
    return values


def staleness_values(trained: Sequence[Trajectory], version: int) -> dict[str, float]:
    """Weight versions between the start of a response and `version`, and the share of tokens by age."""
    ages = np.array([version - trajectory.oldest_version for trajectory in trained])
    spans = [
        (version - span.version, span.end - span.start) for trajectory in trained for span in trajectory.spans
    ]
    token_ages, tokens = np.array(spans).T
    return {
        "staleness/mean": float(ages.mean()),
        "staleness/max": float(ages.max()),
        "staleness/tokens_age_0": float(tokens[token_ages == 0].sum() / tokens.sum()),
        "staleness/tokens_age_1": float(tokens[token_ages == 1].sum() / tokens.sum()),
        "staleness/tokens_older": float(tokens[token_ages > 1].sum() / tokens.sum()),
    }
