"""The head's budget for kept logits, where the run decides it."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.config import HeadConfig, ParallelConfig
from megatron_fipo.model.logprob_head.budget import DeviceMemory, device_memory, logits_budget_mb
from megatron_fipo.objective.config import ObjectiveConfig
from megatron_fipo.trainer import rank_model
from megatron_fipo.trainer.rank_model import RankModel
from tests.distributed.tiny import VOCABULARY, make_trajectories, settings, write_model
from tests.gpu.policies import Shape, one_rank, pack
from tools.bench.harness import Bench

GIB = 2**30
BYTES = st.integers(0, 200 * GIB)
CPU = Bench(torch.device("cpu"))


def test_half_of_what_the_peak_left_free():
    assert logits_budget_mb(DeviceMemory(free=16 * GIB, reserved=60 * GIB, peak=56 * GIB)) == 10 * 1024


@given(BYTES, BYTES, BYTES)
def test_kept_logits_fit_on_top_of_the_peak(free, reserved, peak):
    budget = logits_budget_mb(DeviceMemory(free, reserved, peak)) * 2**20
    assert budget >= 0
    assert budget == 0 or peak + 2 * budget <= reserved + free


def test_a_cpu_recomputes():
    assert device_memory(CPU.device) is None


@pytest.mark.parametrize(("memory", "budget"), [(DeviceMemory(6 * 2**20, 0, 0), 3), (None, 0)])
def test_the_third_step_uses_what_the_second_left(tmp_path: Path, memory, budget):
    """Kept logits give the same weights as recomputed ones, to rounding."""
    folder = write_model(tmp_path, layers=1)
    shape = Shape(1, 32, 48, 4, 2, VOCABULARY, tied=False, positions=256)
    weights = {}
    for given_mb in (None, 0):
        kept: list[int] = []
        with one_rank(CPU, seed=1), mock.patch.object(rank_model, "device_memory", return_value=memory):
            policy = RankModel(
                **settings(folder, ParallelConfig(), head=HeadConfig(logits_memory_mb=given_mb)),
                device=CPU.device,
            )
            policy.load_hf(folder)
            for step in range(4):
                kept.append(policy.head.logits_memory_mb or 0)
                shard = pack(CPU, shape, make_trajectories(3, seed=step))
                (old,) = policy.log_probs([shard])
                policy.policy_step([shard.with_old_log_probs(old)], ObjectiveConfig(), lr=1e-2)
            weights[given_mb] = {name: value.clone() for name, value in policy.modules[0].named_parameters()}
        assert kept == ([0, 0, budget, budget] if given_mb is None else [0] * 4)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[None][name], value, rtol=1e-5, atol=1e-6, msg=name)
