"""Real groups of gloo processes."""

import time

import pytest
import torch

from megatron_fipo.node.preflight.network import (
    all_reduce_bandwidth,
    clock_offset,
    pair_bandwidth,
)
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def _measure_pair(rank: int, world_size: int) -> float:
    return pair_bandwidth(rank, CPU)


def _measure_clock(rank: int, world_size: int, ahead_s: float) -> tuple[float, float] | None:
    shift = ahead_s if rank == 1 else 0.0
    return clock_offset(rank, CPU, lambda: time.time() + shift)


def _measure_slow_answers(rank: int, world_size: int) -> tuple[float, float] | None:
    """A clock that takes 20 ms to read on rank 1, as a long way back to the head."""

    def clock() -> float:
        now = time.time()
        time.sleep(0.02 * rank)
        return now

    return clock_offset(rank, CPU, clock)


def _measure_all(rank: int, world_size: int) -> float:
    return all_reduce_bandwidth(CPU)


def test_both_ends_measure_a_bandwidth():
    speeds = run_ranks(2, _measure_pair)
    assert all(0.001 < speed < 1000 for speed in speeds)


@pytest.mark.parametrize("ahead_s", [-3600.0, 0.0, 0.5])
def test_clock_offset(ahead_s):
    measured, none = run_ranks(2, _measure_clock, ahead_s)
    assert none is None
    offset, uncertainty = measured
    assert abs(offset - ahead_s) <= uncertainty + 1e-3


def test_the_uncertainty_of_a_clock_covers_its_delay():
    (offset, uncertainty), _ = run_ranks(2, _measure_slow_answers)
    assert uncertainty >= 0.01
    assert -uncertainty - 1e-3 <= offset <= -0.005  # it takes both ways to last equally long


@pytest.mark.parametrize("world_size", [2, 4])
def test_all_ranks_agree_on_the_all_reduce(world_size):
    speeds = run_ranks(world_size, _measure_all)
    assert len(set(speeds)) == 1
    assert 0.001 < speeds[0] < 1000
