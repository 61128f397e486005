"""The optimizer step against torch's own AdamW, and training in bfloat16 with the tolerance that bfloat16 allows."""

import pytest
import torch
import torch._dynamo

from megatron_fipo.config import HeadConfig
from megatron_fipo.model import parallel as model_parallel
from megatron_fipo.trainer.rank_model import RankModel
from tests.distributed.test_policy_grid import (
    FIPO,
    LAYOUTS,
    batch,
    exported,
    folders,  # noqa: F401 (a fixture)
    make_shards,
    truth,  # noqa: F401 (a fixture)
)
from tests.distributed.tiny import settings
from tests.ranks import run_ranks


def new_policy(folder, parallel, old, **changes):
    torch.set_num_threads(1)
    model_parallel.initialize(parallel, seed=1)
    policy = RankModel(**settings(folder, parallel, **changes), device=torch.device("cpu"))
    policy.load_hf(folder)
    trajectories, _ = batch()
    return policy, make_shards(policy, parallel, trajectories, old, 160)


def two_steps(rank, world_size, folder, old):
    """Weights before and after two steps without clipping, and the gradients of both, in Megatron's names."""
    policy, shards = new_policy(folder, LAYOUTS["1"], old, clip_grad=0.0)
    parameters = dict(policy.modules[0].named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    gradients = []
    for _ in range(2):
        policy.policy_step(shards, FIPO, lr=1e-3)
        gradients.append({name: parameter.main_grad.clone() for name, parameter in parameters.items()})
    return before, gradients, {name: parameter.detach().clone() for name, parameter in parameters.items()}


def test_the_update_is_adamw_without_decay_of_norms_and_biases(folders, truth):  # noqa: F811
    before, gradients, after = run_ranks(1, two_steps, folders["qwen2"], truth["qwen2", "fipo"][3])[0]
    optimizer = settings(folders["qwen2"], LAYOUTS["1"])["optimizer"]
    parameters = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in before.items()}
    matrices = [parameter for parameter in parameters.values() if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters.values() if parameter.ndim == 1]
    assert matrices
    assert vectors
    groups = [
        {"params": matrices, "weight_decay": optimizer.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(
        groups, lr=1e-3, betas=(optimizer.adam_beta1, optimizer.adam_beta2), eps=optimizer.adam_eps
    )
    for step in gradients:
        for name, parameter in parameters.items():
            parameter.grad = step[name]
        reference.step()
    for name, parameter in parameters.items():
        torch.testing.assert_close(after[name], parameter.detach(), rtol=1e-6, atol=1e-7, msg=name)


def clipped_step(rank, world_size, folder, parallel, old, clip_grad):
    policy, shards = new_policy(folder, parallel, old, clip_grad=clip_grad)
    norm = policy.policy_step(shards, FIPO, lr=1e-3).grad_norm
    # Adam's first moment after one step is (1 - beta1) times the clipped gradient.
    moments = [state["exp_avg"] for _, state in policy.optimizer.state.items()]
    squares = torch.stack([moment.double().square().sum() for moment in moments]).sum()
    torch.distributed.all_reduce(squares)
    return norm, float(squares.sqrt()) / 0.1


@pytest.mark.parametrize("layout", ["1", "dp2", "cp2-dp2"])
def test_the_gradient_is_clipped_to_the_bound(folders, truth, layout):  # noqa: F811
    old = truth["qwen2", "fipo"][3]
    for clip_grad in (0.1, 100.0):
        for norm, used in run_ranks(
            LAYOUTS[layout].world_size, clipped_step, folders["qwen2"], LAYOUTS[layout], old, clip_grad
        ):
            assert norm > 0.2
            assert used == pytest.approx(min(norm, clip_grad), rel=1e-4)


def bfloat16_gradients(rank, world_size, folder, parallel, old):
    policy, shards = new_policy(folder, parallel, old, clip_grad=0.0, dtype="bfloat16")
    result = policy.policy_step(shards, FIPO, lr=0.0)
    own = {
        name: parameter.main_grad.clone()
        for module in policy.modules
        for name, parameter in module.named_parameters()
    }
    return result.statistics, result.grad_norm, own if world_size == 1 else {}


@pytest.mark.parametrize("layout", ["1", "tp2-sp", "pp2", "cp2-dp2"])
def test_bfloat16_training_is_near_the_oracle(folders, truth, layout):  # noqa: F811
    _, loss, gradients, old, _ = truth["qwen2", "fipo"]
    norm = float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())
    for statistics, grad_norm, own in run_ranks(
        LAYOUTS[layout].world_size, bfloat16_gradients, folders["qwen2"], LAYOUTS[layout], old
    ):
        assert grad_norm == pytest.approx(norm, rel=0.1)
        if statistics:
            assert statistics["policy/loss"] == pytest.approx(loss, rel=0.1)
        if own:
            assert all(gradient.dtype == torch.float32 for gradient in own.values())
            head = torch.nn.functional.cosine_similarity(
                own["output_layer.weight"].double().flatten()[: gradients["lm_head.weight"].numel()],
                gradients["lm_head.weight"].flatten(),
                dim=0,
            )
            assert head > 0.99


def score_then_step(rank, world_size, folder, parallel, old):
    policy, shards = new_policy(folder, parallel, old, dtype="bfloat16", head=HeadConfig(logits_memory_mb=1))
    scores = policy.log_probs(shards)
    if policy.is_last_stage:
        shards = [shard.with_old_log_probs(values) for shard, values in zip(shards, scores, strict=True)]
    before = exported(policy)
    statistics = policy.policy_step(shards, FIPO, lr=1e-2).statistics
    return statistics, before, exported(policy)


@pytest.mark.parametrize("layout", ["1", "tp2-sp-cp2", "pp2"])
def test_in_bfloat16_too_the_first_mini_step_reproduces_old_log_probs(folders, truth, layout):  # noqa: F811
    results = run_ranks(
        LAYOUTS[layout].world_size,
        score_then_step,
        folders["qwen2"],
        LAYOUTS[layout],
        truth["qwen2", "fipo"][3],
    )
    reports = [statistics for statistics, _, _ in results if statistics]
    assert reports
    for statistics in reports:
        assert statistics["policy/sigma_log_ratio"] == 0.0
        assert statistics["influence/mean"] == 1.0
    _, before, after = results[0]
    assert any(not torch.equal(before[name], after[name]) for name in before)
