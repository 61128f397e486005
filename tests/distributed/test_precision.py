"""What FP8 and host offload ask of the code around them, as CPU ranks can show it.

The padding that FP8 needs changes no number. Megatron-Core's host-offloaded optimizer is the real one, on real gloo ranks; only its
view of devices is made up: host copies that it makes count as on the host, all else as on a GPU. What this leaves out: copies
between memories, streams, Transformer Engine's Adam for the part that stays (torch's has the same arithmetic).
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._dynamo  # imported once, before the ranks are forked
from megatron.core.optimizer import optimizer_config
from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer

from megatron_fipo.batching.shard import build_shard
from megatron_fipo.config import Config, HeadConfig, ParallelConfig
from megatron_fipo.environment import Accelerators
from megatron_fipo.errors import UserError
from megatron_fipo.model import parallel as model_parallel
from megatron_fipo.trainer import rank_model as policy_module
from megatron_fipo.trainer import rl_worker as worker_module
from megatron_fipo.trainer.rank_model import RankModel
from megatron_fipo.trainer.rl_worker import RLWorker
from tests.distributed.test_distributed_checkpoint import (
    forked_managers,  # noqa: F401 (a fixture)
    load_and_step,
    new_policy,
    step_and_save,
    train,
)
from tests.distributed.test_policy_grid import FIPO, LAYOUTS, relative_error
from tests.distributed.tiny import make_trajectories, settings, write_model
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def model():
    with tempfile.TemporaryDirectory() as folder:
        yield write_model(Path(folder) / "model")


def padded_step(rank, world_size, folder, parallel, token_multiple):
    """Tokens of this rank, the loss, and the gradients of its parameters, summed over data and context ranks."""
    torch.set_num_threads(1)
    model_parallel.initialize(parallel, seed=1)
    arguments = settings(folder, parallel, clip_grad=0.0)
    arguments["optimizer"] = replace(arguments["optimizer"], distributed=False)
    policy = RankModel(**arguments, device=torch.device("cpu"))
    policy.load_hf(folder)
    shard = build_shard(
        make_trajectories(6),
        context_parallel_size=parallel.context_parallel_size,
        context_parallel_rank=rank // parallel.tensor_model_parallel_size,
        length_multiple=parallel.length_multiple,
        pack_multiple=parallel.pack_multiple(token_multiple),
        pad_token_id=0,
        max_position=256,
    )
    result = policy.policy_step([shard.with_old_log_probs(policy.log_probs([shard])[0])], FIPO, lr=0.0)
    gradients = {
        name: parameter.main_grad.clone() for name, parameter in policy.modules[0].named_parameters()
    }
    return shard.input_ids.shape[1], result.statistics["policy/loss"], gradients


@pytest.mark.parametrize("layout", ["1", "tp2-sp", "cp2"])
def test_the_padding_of_fp8_changes_no_gradient(model, layout):
    parallel = LAYOUTS[layout]
    plain, padded = (
        run_ranks(parallel.world_size, padded_step, model, parallel, multiple) for multiple in (1, 128)
    )
    shards = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    for (tokens, loss, gradients), (more_tokens, same_loss, same_gradients) in zip(
        plain, padded, strict=True
    ):
        assert tokens < more_tokens
        assert more_tokens % (128 * shards) == 0
        assert same_loss == pytest.approx(loss, rel=1e-6)
        assert (
            max(relative_error(same_gradients[name], gradient) for name, gradient in gradients.items()) < 1e-5
        )


def pretend_devices():
    """Let the hybrid optimizer tell its host copies from the rest, where all tensors are on the host."""

    def asked_by_hybrid() -> bool:
        return sys._getframe(2).f_globals.get("__name__", "") == HybridDeviceOptimizer.__module__

    def keeping(name: str, to_host: bool = False):
        method = getattr(torch.Tensor, name)

        def call(self, *args, **kwargs):
            out = method(self, *args, **kwargs)
            if asked_by_hybrid() and (to_host or getattr(self, "_on_host", False)):
                out._on_host = True
            return out

        return call

    really = torch._C.TensorBase.is_cuda
    move = torch.Tensor.to
    torch.Tensor.is_cuda = property(
        lambda self: not getattr(self, "_on_host", False) if asked_by_hybrid() else really.__get__(self)
    )
    for name in ("detach", "clone", "float"):
        setattr(torch.Tensor, name, keeping(name))
    torch.Tensor.cpu = keeping("cpu", to_host=True)
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    torch.Tensor.to = lambda self, *args, **kwargs: (
        self if args[:1] == ("cuda",) else move(self, *args, **kwargs)
    )
    optimizer_config.is_te_min_version = lambda *args, **kwargs: (
        False
    )  # 0.16 asks a version that is not there
    policy_module.find_accelerators = lambda: Accelerators((9, 0), "13.0", "2.9.0")


def offloading(function):
    def run(rank, world_size, *args):
        pretend_devices()
        return function(rank, world_size, *args)

    return run


def changes(offload: float) -> dict:
    """A bound on the gradient so low that Adam's epsilon counts: whoever clips no gradient takes other steps."""
    return {"dtype": "bfloat16", "cpu_offload": offload, "clip_grad": 1e-3}


def three_steps(rank, world_size, folder, parallel, changes):
    policy, shards = new_policy(folder, parallel, **changes)
    return train(policy, shards, 3)


def same_weights(straight, resumed):
    for (losses, weights, _), (losses_found, weights_found, _) in zip(straight, resumed, strict=True):
        assert losses == losses_found
        assert all(torch.equal(weights_found[name], tensor) for name, tensor in weights.items())


@pytest.fixture(scope="module")
def runs(model, forked_managers):  # noqa: F811
    """By share of offload: the folder saved after two steps, and how the two ranks continued."""
    with tempfile.TemporaryDirectory() as folder:
        made = {}
        for offload in (0.0, 0.5, 1.0):
            target = Path(folder) / str(offload)
            target.mkdir()
            arguments = (model, ParallelConfig(data_parallel_size=2), target, 2, changes(offload))
            made[offload] = target, run_ranks(2, offloading(step_and_save), *arguments)
        yield made


@pytest.mark.parametrize("offload", [0.5, 1.0])
def test_offloaded_state_takes_the_same_steps(runs, offload):
    """From the loaded weights, which the host's copies have to follow; with clipping, which has to find the gradients."""
    same_weights(runs[0.0][1], runs[offload][1])


@pytest.mark.parametrize(("before", "after"), [(1.0, 1.0), (0.5, 0.5), (0.0, 0.5), (1.0, 0.0), (0.5, 1.0)])
def test_a_run_goes_on_with_another_share_offloaded(model, runs, before, after):
    source, straight = runs[before]
    arguments = (model, ParallelConfig(data_parallel_size=2), source, changes(after))
    resumed = run_ranks(2, offloading(load_and_step), *arguments)
    same_weights(straight, resumed)


@pytest.mark.parametrize("offload", [0.5, 1.0])
def test_a_save_before_the_first_step_changes_nothing(model, tmp_path, offload):
    """Neither for the run that saves nor for one that resumes from it: the step that makes the state is not counted."""
    parallel = ParallelConfig(data_parallel_size=2)
    straight = run_ranks(2, offloading(three_steps), model, parallel, changes(offload))
    same_weights(
        straight, run_ranks(2, offloading(step_and_save), model, parallel, tmp_path, 0, changes(offload))
    )
    same_weights(
        straight, run_ranks(2, offloading(load_and_step), model, parallel, tmp_path, changes(offload))
    )


def test_offload_is_refused_where_there_is_no_gpu(model):
    with pytest.raises(
        AssertionError, match=r"UserError: optimizer.cpu_offload=1.0 needs a GPU and Transformer Engine"
    ):
        run_ranks(1, load_and_step, model, ParallelConfig(), None, changes(1.0))


def test_kernels_that_cannot_run_are_refused_before_anything_is_built(model, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = settings(model, ParallelConfig(), head=HeadConfig(kernels="triton"))
    with pytest.raises(UserError, match=r"head.kernels=triton cannot run here: .*; set it to auto or torch"):
        RankModel(**arguments, device=torch.device("cpu"))


def test_torchs_adam_is_refused_on_a_gpu_before_anything_is_built(model, monkeypatch):
    monkeypatch.setattr(worker_module, "ADAM", "torch")
    config = Config()
    config.model.path = str(model)
    worker = RLWorker(0, 1, config)
    worker.device = torch.device("cuda", 0)
    with pytest.raises(
        UserError, match="training on GPUs needs Adam of Transformer Engine or of NVIDIA's apex"
    ):
        worker.build()
