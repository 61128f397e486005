"""The collector with several training sets: each set's response limit, and a resumed run that equals one without a stop."""

import json
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.config import RolloutConfig
from megatron_fipo.driver.all_wrong import AllWrongWatch
from megatron_fipo.driver.rollout.collector import Collector
from megatron_fipo.driver.rollout.trajectories import Overlong
from megatron_fipo.run_dir.loop_state import RolloutState
from megatron_fipo.tasks.mixture import Mixture
from megatron_fipo.tasks.task import TaskSettings
from tests.driver.collecting import train
from tests.driver.toy_pool import MAX_LENGTH, ToyPool, dataset, decode

LIMITS = {"math": MAX_LENGTH, "code": MAX_LENGTH + 7}


def mixture(weight=2.0) -> Mixture:
    sets = {
        name: [
            replace(problem, problem_id=f"{name}/{problem.problem_id}", task=TaskSettings(name, "", limit))
            for problem in dataset(size).problems
        ]
        for (name, limit), size in zip(LIMITS.items(), (11, 7), strict=True)
    }
    return Mixture(sets, {"math": weight, "code": 1.0}, seed=3)


def collector(pool: ToyPool, unfinished: str = "drop", **options) -> Collector:
    config = RolloutConfig(
        prompts_in_flight=4, max_response_length=2 * MAX_LENGTH, unfinished=unfinished, **options
    )
    return Collector(
        mixture(),
        pool,
        pool.scorers,
        AllWrongWatch(decode, print),
        config,
        Overlong(2 * MAX_LENGTH, 0, 1.0),
        target_groups=3,
        responses_per_prompt=3,
        seed=1,
    )


def names(collected) -> list[list[str]]:
    return [[group[0].group_id for group in batch.groups] for batch in collected]


def test_requests_have_the_limit_of_their_set():
    pool = ToyPool(["mixed"])
    batches = list(train(collector(pool), pool, "synchronous", range(4), random.Random(0)))
    sets = [requests[0].request_id.partition("-")[2].partition("/")[0] for requests in pool.submitted]
    assert set(sets) == LIMITS.keys()
    assert pool.limits == [LIMITS[name] for name in sets]
    groups = [group for batch in batches for group in batch.groups]
    assert {group[0].set_name for group in groups} == LIMITS.keys()


@settings(max_examples=25, deadline=None)
@given(
    outcomes=st.lists(st.sampled_from(["mixed", "mixed", "right", "wrong"]), min_size=2, max_size=6),
    stop=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_a_resumed_run_trains_on_the_same_groups(outcomes, stop, seed):
    outcomes = ["mixed", *outcomes]
    straight = ToyPool(outcomes, seed)
    expected = names(train(collector(straight), straight, "synchronous", range(6), random.Random(seed)))
    before = ToyPool(outcomes, seed + 1)
    first = collector(before)
    batches = names(train(first, before, "synchronous", range(stop), random.Random(seed)))
    state = first.state()
    after = ToyPool(outcomes, seed + 2)
    second = collector(after)
    second.load_state(RolloutState(json.loads(json.dumps(state.values)), state.tokens))
    batches += names(train(second, after, "synchronous", range(stop, 6), random.Random(seed)))
    assert batches == expected


def test_a_group_of_a_problem_that_is_gone_is_refused():
    pool = ToyPool(["mixed"])
    first = collector(pool)
    list(train(first, pool, "synchronous", range(2), random.Random(0)))
    state = first.state()
    state.values["dataset"]["sets"]["math"]["rows"] = "other"
    with pytest.raises(Exception, match="not the one of the checkpoint"):
        collector(ToyPool(["mixed"])).load_state(state)
