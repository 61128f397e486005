"""`rollout.placement=auto`: engines share the ranks' GPUs exactly if there are too few GPUs and they can."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.config import Config, ParallelConfig, RolloutConfig, placement_note, with_placement
from megatron_fipo.config.placement import ENGINES, sharing_obstacle


def run(ranks: int = 1, engines: int = 1, size: int = 1, **rollout: str) -> Config:
    return Config(
        parallel=ParallelConfig(data_parallel_size=ranks),
        rollout=RolloutConfig(num_engines=engines, engine_tensor_parallel_size=size, **rollout),
    )


@pytest.mark.parametrize(
    ("config", "gpus", "colocated"),
    [
        (run(), 1, True),
        (run(), 2, False),
        (run(), 0, False),
        (run(engine="vllm"), 1, True),
        (run(4, 4), 4, True),
        (run(4, 2), 5, True),
        (run(4, 4), 8, False),
        (run(4, 4), 3, False),
        (run(4, 5), 4, False),
        (run(4, 2, 2, engine="vllm"), 4, False),
        (run(mode="one_step_off"), 1, False),
        (run(mode="fully_asynchronous", unfinished="continue"), 1, False),
        (run(engine="mine:Engine"), 1, False),
        (run(placement="separate"), 1, False),
        (run(placement="colocated"), 8, True),
    ],
)
def test_what_auto_becomes(config: Config, gpus: int, colocated: bool):
    assert with_placement(config, gpus).rollout.colocated == colocated


def test_nothing_but_the_placement_changes_and_a_given_one_stays():
    config = run(4, 4)
    placed = with_placement(config, 4)
    assert (config.rollout.placement, placed.rollout.placement) == ("auto", "colocated")
    placed.rollout.placement = "auto"
    assert placed == config
    given_one = run(placement="separate")
    assert with_placement(given_one, 1) is given_one
    assert with_placement(with_placement(config, 4), 100).rollout.colocated, "decided once"


@given(
    st.integers(1, 16),
    st.integers(1, 16),
    st.integers(1, 4),
    st.integers(0, 40),
    st.sampled_from([*ENGINES, "a:B"]),
    st.sampled_from(["synchronous", "one_step_off"]),
)
def test_auto_shares_only_what_an_explicit_setting_may_share(ranks, engines, size, gpus, engine, mode):
    config = run(ranks, engines, size, engine=engine, mode=mode)
    if with_placement(config, gpus).rollout.colocated:
        assert sharing_obstacle(config) is None
        assert ranks <= gpus < ranks + engines * size
    elif gpus >= ranks and sharing_obstacle(config) is None:
        assert gpus >= ranks + engines * size


def test_a_placement_that_nobody_decided_cannot_be_read():
    with pytest.raises(RuntimeError, match="placement=auto was read before"):
        _ = run().rollout.colocated


def test_the_choice_is_reported_with_the_numbers_that_made_it():
    assert placement_note(run(), 1) == (
        "rollout.placement=auto is colocated: of 1 GPU the ranks need 1 and the engines 1, so engines share the GPUs of ranks and "
        "sleep during updates"
    )
    assert placement_note(run(2, 3), 8) == (
        "rollout.placement=auto is separate: of 8 GPUs the ranks need 2 and the engines 3"
    )
    assert placement_note(run(), 0) is placement_note(run(placement="separate"), 1) is None
