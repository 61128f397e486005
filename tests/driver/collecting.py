"""A collector on a `ToyPool`, called as the training loop calls it."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron_fipo.config import RolloutConfig
from megatron_fipo.driver.all_wrong import AllWrongWatch
from megatron_fipo.driver.rollout.collector import Collected, Collector
from megatron_fipo.driver.rollout.trajectories import Overlong
from tests.driver.toy_pool import MAX_LENGTH, ToyPool, dataset, decode

N = 3


def make(pool: ToyPool, target: int = 3, log: Callable[[str], None] = print, **options: Any) -> Collector:
    config = RolloutConfig(**{"prompts_in_flight": 4, "max_response_length": MAX_LENGTH, **options})
    return Collector(
        dataset(),
        pool,
        pool.scorers,
        AllWrongWatch(decode, log),
        config,
        Overlong(MAX_LENGTH, 0, 1.0),
        target_groups=target,
        responses_per_prompt=N,
        seed=1,
    )


def until_enough(collector: Collector) -> None:
    while not collector.enough:
        collector.step(0.0)


def train(
    collector: Collector, pool: ToyPool, mode: str, versions: Sequence[int], timing: random.Random
) -> Iterator[Collected]:
    """The training loop's calls in each mode, with interruptions; yields while the collector is paused."""
    for version in versions:
        pool.version = version
        collector.resume(version)
        while not collector.enough:
            collector.step(0.0)
            if timing.random() < 0.1:  # as for an evaluation
                collector.pause()
                collector.resume(version)
        if mode == "synchronous":
            collector.pause()
        collected = collector.pop_batch()
        if mode != "synchronous":
            for _ in range(timing.randrange(6)):
                collector.step(0.0)
        if mode == "one_step_off":
            until_enough(collector)
        collector.pause()
        assert pool.outstanding == pool.scorers.outstanding == 0
        yield collected


def run(pool: ToyPool, iterations: int = 4, timing: int = 0, **options: Any) -> list[Collected]:
    mode = options.get("mode", "synchronous")
    return list(train(make(pool, **options), pool, mode, range(iterations), random.Random(timing)))


def serials(collected: Collected) -> list[int]:
    return [int(group[0].group_id.partition("-")[0]) for group in collected.groups]


def responses(runs: Sequence[Collected]) -> list[list[tuple[str, list[int]]]]:
    return [
        [(t.group_id, t.response_ids.tolist()) for group in collected.groups for t in group]
        for collected in runs
    ]
