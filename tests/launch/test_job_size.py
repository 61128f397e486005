"""What a job needs: nodes for ranks and engines, and seconds to save before the time limit."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.config import Config, ParallelConfig, RolloutConfig
from megatron_fipo.errors import UserError
from megatron_fipo.launch.needs import Allocation, check_allocation
from megatron_fipo.launch.notice import check_limit, limit_s, notice_s
from megatron_fipo.launch.script import DEFAULT_NOTICE_S
from megatron_fipo.run_dir.metrics_log import Record


def config(ranks: int, engines: int = 1, size: int = 1, placement: str = "separate") -> Config:
    return Config(
        parallel=ParallelConfig(data_parallel_size=ranks),
        rollout=RolloutConfig(
            num_engines=engines, engine_tensor_parallel_size=size, placement=placement, engine="vllm"
        ),
    )


@pytest.mark.parametrize(
    ("run", "allocation", "fits"),
    [
        (config(8, 4, 2), Allocation(2, 8, None), True),
        (config(9, 4, 2), Allocation(2, 8, None), False),
        (config(8, 8, placement="colocated"), Allocation(1, 8, None), True),
        (config(8, 8, placement="auto"), Allocation(1, 8, None), True),
        (config(8, 9, placement="auto"), Allocation(1, 8, None), False),
        (config(8, 8, placement="auto"), Allocation(1, 7, None), False),
        (config(1, 1, placement="auto"), Allocation(1, 1, 1), True),
        (config(1, 1, placement="auto"), Allocation(1, 0, 1), False),
        (config(2, 1), Allocation(1, 0, 3), True),
        (config(2, 2), Allocation(1, 0, 3), False),
        (config(8, 8, 1), Allocation(1, 16, 15), False),
        (config(100, 1), Allocation(1, 0, None), True),
    ],
)
def test_ranks_and_engines_must_fit(run, allocation, fits):
    if fits:
        check_allocation(run, allocation)
    else:
        with pytest.raises(UserError, match="the run needs"):
            check_allocation(run, allocation)


@given(st.integers(1, 2000), st.integers(1, 64), st.integers(1, 16))
def test_the_number_of_nodes_in_the_message_is_the_smallest_that_fits(ranks, engines, per_node):
    run = config(ranks, engines)
    enough = math.ceil((ranks + engines) / per_node)
    check_allocation(run, Allocation(enough, per_node, None))
    if enough > 1:
        with pytest.raises(UserError, match=f"use at least {enough:,} nodes"):
            check_allocation(run, Allocation(enough - 1, per_node, None))


def records(*times: dict[str, float]) -> list[Record]:
    return [
        Record("iteration", number, 0.0, {f"time/{name}": value for name, value in entry.items()})
        for number, entry in enumerate(times)
    ]


def test_the_notice_is_twice_the_longest_update_and_save_and_a_minute():
    slow = {"update": 200.0, "old_log_probs": 40.0, "checkpoint": 0.0, "rollout": 3000.0}
    saving = {"update": 100.0, "old_log_probs": 30.0, "checkpoint": 50.0}
    assert notice_s(records(slow, saving)) == 2 * (200 + 40 + 50) + 20 + 60
    assert notice_s([]) == DEFAULT_NOTICE_S
    assert notice_s(records({"update": math.nan})) == 60


@pytest.mark.parametrize("seconds", [40_000.0, 1e308])
def test_the_notice_is_one_that_sbatch_accepts(seconds):
    assert notice_s(records({"update": seconds, "checkpoint": seconds})) == 65_535


def test_the_notice_forgets_what_was_long_ago():
    assert notice_s(records({"update": 5000.0}, *({"update": 10.0},) * 50)) == 120


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("4:00:00", 14400),
        ("1-2", 93600),
        ("1-2:30", 95400),
        ("1-2:30:15", 95415),
    ],
)
def test_time_limits_are_read_as_by_sbatch(time, seconds):
    assert limit_s(time) == seconds
    check_limit(time, seconds - 1)
    with pytest.raises(
        UserError, match=f"time={time} is {seconds:,} s, not longer than the {seconds:,} s before"
    ):
        check_limit(time, seconds)


def test_no_time_limit_is_long_enough():
    check_limit(None, 10**6)
    check_limit("0", 10**6)  # as sbatch reads it
