"""Throughput, MFU, waits and memory against numbers worked out by hand."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.config import Config, ModelConfig, ParallelConfig, RolloutConfig
from megatron_fipo.driver.rollout.engine_usage import EngineUsage, RolloutUsage
from megatron_fipo.driver.throughput import (
    Capacity,
    Devices,
    Work,
    cost_values,
    devices_of,
    mfu_values,
    rank_values,
    throughput_values,
)
from megatron_fipo.driver.trainer_group import RLTrainer
from megatron_fipo.families.flops import ModelFlops
from megatron_fipo.phases import PHASES
from megatron_fipo.trainer.protocol import RankCosts

WORK = Work(lengths=[100, 300], rows=250)
SECONDS = {
    **{phase.name: 0.0 for phase in PHASES},
    "rollout": 4.0,
    "handover": 1.0,
    "old_log_probs": 2.0,
    "update": 3.0,
    "rollout_wait": 6.0,
    "total": 20.0,
}


def test_tokens_per_second_and_device():
    values = throughput_values(WORK, 1200, Devices(ranks=2, engines=3, total=5), SECONDS, False)
    assert values == {
        "throughput/tokens_per_s_per_gpu": 400 / 20 / 5,
        "throughput/rollout_tokens_per_s_per_gpu": 1200 / 10 / 3,
        "throughput/train_tokens_per_s_per_gpu": 400 / 5 / 2,
        "wait/trainer": 0.5,
    }


def test_engines_that_sample_during_the_update_have_that_time_too():
    values = throughput_values(WORK, 1200, Devices(2, 3, 5), SECONDS, True)
    assert values["throughput/rollout_tokens_per_s_per_gpu"] == 1200 / 16 / 3


def test_engines_without_anything_to_sample_have_no_rate():
    """The last iteration of `one_step_off`: its groups were sampled during the one before."""
    values = throughput_values(
        WORK, 0, Devices(2, 3, 5), {**SECONDS, "rollout": 0.01, "rollout_wait": 0.0}, False
    )
    assert values.keys() == {
        "throughput/tokens_per_s_per_gpu",
        "throughput/train_tokens_per_s_per_gpu",
        "wait/trainer",
    }


def test_mfu_is_the_work_of_the_model_over_the_peak_of_all_ranks():
    flops = ModelFlops(per_token=1000, per_pair=2, per_row=100)
    forward = 1000 * 400 + 2 * (100**2 + 300**2) / 2 + 100 * 250
    capacity = Capacity(Devices(2, 1, 3), flops, forward_passes=2, peak_flops=1e6)
    assert mfu_values(WORK, capacity, SECONDS) == {
        "mfu/old_log_probs": 2 * forward / 2.0 / 1e6,
        "mfu/update": 3 * forward / 3.0 / 1e6,
    }
    assert mfu_values(WORK, replace(capacity, peak_flops=None), SECONDS) == {}


@pytest.mark.parametrize(("peaks", "together"), [([1e12, 2e12], 3e12), ([1e12, None], None), ([None], None)])
def test_one_rank_with_an_unknown_peak_makes_that_of_all_unknown(
    peaks: list[float | None], together: float | None
):
    answers: Any = SimpleNamespace(call=lambda method: peaks)
    assert RLTrainer.peak_flops(answers) == together


def test_all_costs_of_an_iteration():
    capacity = Capacity(Devices(2, 3, 5), ModelFlops(1, 1, 1), forward_passes=1, peak_flops=1e6)
    idle = EngineUsage(0.25, None, None, None, None, None, None)
    values = cost_values(
        capacity,
        WORK,
        SECONDS,
        [RankCosts(1.0, 2.0, 3)],
        RolloutUsage([idle], 1200, 0.5),
        sampled_during_update=True,
    )
    assert values["time/total"] == 20.0
    assert values["overhead/scoring"] == 0.5
    assert values["throughput/rollout_tokens_per_s_per_gpu"] == 1200 / 16 / 3
    assert {"mfu/update", "overhead/shards", "memory/host_gib", "engine_mean/idle"} < values.keys()


def test_no_time_is_no_error_and_a_replay_has_no_rate_of_engines():
    still = throughput_values(WORK, 0, Devices(1, 0, 1), dict.fromkeys(SECONDS, 0.0), False)
    assert still == {
        "throughput/tokens_per_s_per_gpu": 0.0,
        "throughput/train_tokens_per_s_per_gpu": 0.0,
        "wait/trainer": 0.0,
    }


@pytest.mark.parametrize(
    ("placement", "tensor", "expected"),
    [("separate", 2, Devices(8, 6, 14)), ("colocated", 1, Devices(8, 3, 8))],
)
def test_colocated_engines_use_the_gpus_of_the_trainer(placement: str, tensor: int, expected: Devices):
    config = Config(
        model=ModelConfig(path="m"),
        parallel=ParallelConfig(data_parallel_size=4, tensor_model_parallel_size=2),
        rollout=RolloutConfig(num_engines=3, engine_tensor_parallel_size=tensor, placement=placement),
    )
    assert devices_of(config, live=True) == expected
    assert devices_of(config, live=False) == Devices(8, 0, 8)


@given(
    st.lists(
        st.builds(
            RankCosts,
            st.floats(0, 9),
            st.floats(0, 9),
            st.integers(1, 2**40),
            st.integers(0, 2**40),
            st.integers(0, 2**40),
        ),
        min_size=1,
        max_size=9,
    )
)
def test_each_largest_cost_names_its_rank(costs: list[RankCosts]):
    values = rank_values(costs)
    assert values["overhead/shards"] == max(cost.shards_s for cost in costs)
    assert values["overhead/unpickle"] == max(cost.unpickle_s for cost in costs)
    for name, field in (("device", "device_bytes"), ("reserved", "reserved_bytes"), ("host", "host_bytes")):
        largest = max(getattr(cost, field) for cost in costs)
        assert values[f"memory/{name}_gib"] == largest / 2**30
        assert getattr(costs[int(values[f"memory/{name}_rank"])], field) == largest


def test_the_budget_for_logits_is_the_smallest_of_the_ranks_with_a_head():
    costs = [RankCosts(0.0, 0.0, 1), *(RankCosts(0.0, 0.0, 1, logits_bytes=n * 2**30) for n in (3, 2, 5))]
    assert rank_values(costs)["memory/logits_gib"] == 2.0


def test_without_a_gpu_there_is_no_device_memory():
    assert set(rank_values([RankCosts(0.0, 0.0, 2**30)])) == {
        "overhead/unpickle",
        "overhead/shards",
        "memory/host_gib",
        "memory/host_rank",
    }
