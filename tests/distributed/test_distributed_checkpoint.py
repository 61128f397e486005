"""Weights and optimizer saved under one layout go on under another; a disk that fills up is one sentence on every rank."""

import resource
import signal
import tempfile
from pathlib import Path

import pytest
import torch
import torch._dynamo  # imported once, before the ranks are forked

from megatron_fipo.checkpoint.distributed import load_checkpoint, save_checkpoint
from megatron_fipo.config import ParallelConfig
from megatron_fipo.errors import UserError
from megatron_fipo.model import parallel as model_parallel
from megatron_fipo.trainer.policy import Policy
from tests.distributed.test_policy_grid import FIPO, LAYOUTS, batch, exported, make_shards
from tests.distributed.tiny import settings, write_model
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def model():
    with tempfile.TemporaryDirectory() as folder:
        yield write_model(Path(folder) / "model")


def new_policy(folder: Path, parallel: ParallelConfig):
    torch.set_num_threads(1)
    model_parallel.initialize(parallel, seed=1)
    policy = Policy(**settings(folder, parallel, lr=1e-3), device=torch.device("cpu"))
    policy.load_hf(folder)
    trajectories, offsets = batch()
    return policy, make_shards(policy, parallel, trajectories, offsets.astype("float32"), 160)


def step_and_save(rank, world_size, folder, parallel, target):
    """Two steps, a save, and a third step to compare with."""
    policy, shards = new_policy(folder, parallel)
    for _ in range(2):
        policy.policy_step(shards, FIPO, lr=1e-3)
    save_checkpoint(policy.modules, policy.optimizer, target)
    return policy.policy_step(shards, FIPO, lr=1e-3).statistics, exported(policy)


def load_and_step(rank, world_size, folder, parallel, source):
    policy, shards = new_policy(folder, parallel)
    load_checkpoint(policy.modules, policy.optimizer, source)
    return policy.policy_step(shards, FIPO, lr=1e-3).statistics, exported(policy)


@pytest.mark.parametrize(
    ("saved", "loaded"), [("1", "1"), ("tp2-dp2", "tp2-dp2"), ("tp2-dp2", "pp2"), ("pp2-vpp2", "cp2"), ("1", "tp2-sp")]
)
def test_training_goes_on_from_a_checkpoint_of_any_layout(model, tmp_path, saved, loaded):
    straight = run_ranks(LAYOUTS[saved].world_size, step_and_save, model, LAYOUTS[saved], tmp_path)
    resumed = run_ranks(LAYOUTS[loaded].world_size, load_and_step, model, LAYOUTS[loaded], tmp_path)
    expected = next(statistics for statistics, _ in straight if statistics)
    found = next(statistics for statistics, _ in resumed if statistics)
    assert found["policy/loss"] == pytest.approx(expected["policy/loss"], rel=1e-6 if saved != loaded else 0)
    for name, tensor in straight[0][1].items():
        if saved == loaded:
            assert torch.equal(resumed[0][1][name], tensor), name
        else:
            torch.testing.assert_close(resumed[0][1][name], tensor, rtol=1e-5, atol=1e-6)


def save_without_room(rank, world_size, folder, parallel, target):
    policy, shards = new_policy(folder, parallel)
    policy.policy_step(shards, FIPO, lr=1e-3)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        save_checkpoint(policy.modules, policy.optimizer, target)
    except UserError as error:
        return str(error)
    return "saved"


def test_a_full_disk_is_one_sentence_on_every_rank(model, tmp_path):
    for message in run_ranks(2, save_without_room, model, LAYOUTS["tp2"], tmp_path):
        assert message.startswith(f"cannot write the checkpoint {tmp_path}")
        assert "\n" not in message
