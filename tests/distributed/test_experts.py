"""Experts over real ranks: no layout may change a loss, a gradient or a weight, and the first mini-step is exact.

The reference is that of `test_policy_grid.py`: transformers' Qwen3-MoE in float64, one sequence at a time, and plain autograd.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo  # imported once, before the ranks are forked
from safetensors.torch import load_file

from megatron_fipo.config import ParallelConfig, RouterConfig
from megatron_fipo.families.fused_experts import separate
from megatron_fipo.model import parallel as model_parallel
from megatron_fipo.trainer.rank_model import RankModel
from tests.distributed.test_policy_grid import (
    COUNT,
    FIPO,
    assert_same_step,
    batch,
    engine_log_probs,
    exported,
    hf_log_probs,
    hf_model,
    make_shards,
    relative_error,
)
from tests.distributed.tiny import settings, write_model
from tests.objective.oracle import Response, oracle_loss
from tests.ranks import run_ranks

MODELS = ("qwen3_moe", "qwen3_moe-mixed")
SP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
EP2 = {"expert_model_parallel_size": 2}
LAYOUTS: dict[str, ParallelConfig] = {
    name: ParallelConfig(**sizes)
    for name, sizes in {
        "1": {},
        "dp2": {"data_parallel_size": 2},
        "dp2-ep2": {"data_parallel_size": 2, **EP2},
        "cp2-ep2": {"context_parallel_size": 2, **EP2},
        "tp2-ep2": {**SP2, **EP2},
        "tp2-etp2": {**SP2, "expert_tensor_parallel_size": 2},
        "tp2": {**SP2},
        "pp2": {"pipeline_model_parallel_size": 2},
        "pp2-dp2-ep2": {"pipeline_model_parallel_size": 2, "data_parallel_size": 2, **EP2},
        "pp2-vpp2-cp2-ep2": {
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
            "context_parallel_size": 2,
            **EP2,
        },
        "tp2-dp2-ep4": {**SP2, "data_parallel_size": 2, "expert_model_parallel_size": 4},
        "tp2-cp2-ep2-etp2": {**SP2, "context_parallel_size": 2, **EP2, "expert_tensor_parallel_size": 2},
        "dp4-ep2": {"data_parallel_size": 4, **EP2},
        "dp4-ep4": {"data_parallel_size": 4, "expert_model_parallel_size": 4},
    }.items()
}


@pytest.fixture(scope="module")
def folders():
    with tempfile.TemporaryDirectory() as folder:
        yield {name: write_model(Path(folder) / name, family=name) for name in MODELS}


@pytest.fixture(scope="module")
def truth(folders):
    """By model: the oracle's loss and gradients, and the old log-probs it used."""
    return {name: oracle(folder) for name, folder in folders.items()}


def oracle(folder: Path, router: Callable[[Any], None] | None = None):
    """(loss, gradients by name, old log-probs). `router` changes the model first."""
    trajectories, offsets = batch()
    model = hf_model(folder)
    if router is not None:
        router(model)
    scored = hf_log_probs(model, trajectories, settings(folder, ParallelConfig())["temperature"])
    responses, old = [], []
    for index, (trajectory, (log_probs, entropy)) in enumerate(zip(trajectories, scored, strict=True)):
        old_log_probs = log_probs.detach() + torch.from_numpy(offsets[index, : len(log_probs)])
        mask = torch.tensor(trajectory.response_mask, dtype=torch.float64)
        old.append(old_log_probs.float().numpy())
        responses.append(
            Response(
                log_probs,
                old_log_probs,
                torch.full_like(mask, trajectory.advantage),
                mask,
                entropy=entropy,
                rollout_log_probs=torch.from_numpy(engine_log_probs(index, old[-1])).double(),
            )
        )
    result = oracle_loss(responses, FIPO)
    result.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return float(result.loss.detach()), separate(gradients), old


def new_policy(
    folder: Path, parallel: ParallelConfig, recompute: str = "none", distributed: bool = True, **router: Any
) -> RankModel:
    torch.set_num_threads(1)
    model_parallel.initialize(parallel, seed=1)
    arguments = settings(folder, parallel, clip_grad=0.0, recompute=recompute, router=RouterConfig(**router))
    arguments["optimizer"] = replace(arguments["optimizer"], distributed=distributed)
    policy = RankModel(**arguments, device=torch.device("cpu"))
    policy.load_hf(folder)
    return policy


def gradients_of(policy: RankModel) -> dict[str, torch.Tensor]:
    """Every parameter's normalized gradient in Hugging Face names, on rank 0; it replaces the parameters."""
    with torch.no_grad():
        for module in policy.modules:
            for parameter in module.parameters():
                parameter.copy_(parameter.main_grad)
    return exported(policy)


def step_on_rank(rank, world_size, folder, parallel, old, recompute, replay, token_budget):
    """One step at learning rate 0 with a trained router: statistics, gradient norm, and all gradients."""
    policy = new_policy(folder, parallel, recompute, distributed=False, trainable=True)
    shards = make_shards(policy, parallel, batch()[0], old, token_budget)
    routes = policy.new_routes(shards) if replay else None
    if replay:
        policy.log_probs(shards, chosen=routes)
    result = policy.policy_step(shards, FIPO, lr=0.0, replayed=routes)
    return result.statistics, result.grad_norm, gradients_of(policy)


CASES = [
    *(("qwen3_moe", layout, "none", True, 160) for layout in LAYOUTS),
    *(("qwen3_moe", layout, "none", True, budget) for layout in ("1", "dp2-ep2") for budget in (56, 4096)),
    *(
        ("qwen3_moe", layout, "full", True, 160)
        for layout in ("1", "tp2-ep2", "pp2-dp2-ep2", "pp2-vpp2-cp2-ep2")
    ),
    *(("qwen3_moe", layout, "none", False, 160) for layout in ("1", "dp2-ep2", "pp2-vpp2-cp2-ep2")),
    *(("qwen3_moe-mixed", layout, "none", True, 160) for layout in ("1", "pp2-dp2-ep2", "tp2-cp2-ep2-etp2")),
    ("qwen3_moe-mixed", "pp2-vpp2-cp2-ep2", "full", True, 160),
]
"""Of 56 tokens a micro-batch holds one or two sequences, of 4,096 all."""


@pytest.mark.parametrize(("name", "layout", "recompute", "replay", "token_budget"), CASES)
def test_loss_and_every_gradient_equal_the_oracle(
    folders, truth, name, layout, recompute, replay, token_budget
):
    """That of the router too, with and without replay of the routes of the old log-probs."""
    parallel, (loss, gradients, old) = LAYOUTS[layout], truth[name]
    results = run_ranks(
        parallel.world_size, step_on_rank, folders[name], parallel, old, recompute, replay, token_budget
    )
    assert all(gradients[weight].abs().max() > 0 for weight in gradients if "mlp.gate" in weight)
    assert_same_step(results, loss, gradients)


def score_then_step(rank, world_size, folder, parallel, recompute, trainable):
    """Old log-probs by the policy itself, then two steps on the same shards with the recorded routes."""
    policy = new_policy(folder, parallel, recompute, trainable=trainable)
    zeros = [np.zeros(64, dtype=np.float32)] * COUNT
    shards = make_shards(policy, parallel, batch()[0], zeros, 160)
    routes = policy.new_routes(shards)
    scores = policy.log_probs(shards, chosen=routes)
    if policy.is_last_stage:
        shards = [shard.with_old_log_probs(values) for shard, values in zip(shards, scores, strict=True)]
    return [policy.policy_step(shards, FIPO, lr=1e-3, replayed=routes).statistics for _ in range(2)]


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [
        *((layout, "none") for layout in LAYOUTS),
        *((layout, "full") for layout in ("1", "tp2-ep2", "pp2-vpp2-cp2-ep2")),
    ],
)
def test_first_mini_step_reproduces_old_log_probs_bit_for_bit(folders, layout, recompute):
    parallel = LAYOUTS[layout]
    results = run_ranks(parallel.world_size, score_then_step, folders["qwen3_moe"], parallel, recompute, True)
    reports = [result for result in results if result[0]]
    assert reports
    for first, second in reports:
        assert first["policy/sigma_log_ratio"] == 0.0
        assert first["influence/mean"] == first["influence/max"] == 1.0
        assert second["policy/sigma_log_ratio"] > 0.0


def update_on_rank(rank, world_size, folder, parallel, old, trainable):
    """Two real steps; the updated weights on rank 0."""
    policy = new_policy(folder, parallel, trainable=trainable)
    shards = make_shards(policy, parallel, batch()[0], old, 160)
    for _ in range(2):
        policy.policy_step(shards, FIPO, lr=1e-3)
    return exported(policy)


@pytest.mark.parametrize(
    "layout", ["dp2-ep2", "tp2-ep2", "tp2", "pp2-vpp2-cp2-ep2", "tp2-cp2-ep2-etp2", "dp4-ep2"]
)
def test_updated_weights_equal_those_of_one_rank(folders, truth, layout):
    folder, old = folders["qwen3_moe"], truth["qwen3_moe"][2]
    start = load_file(folder / "model.safetensors")
    alone = run_ranks(1, update_on_rank, folder, LAYOUTS["1"], old, True)[0]
    found = run_ranks(LAYOUTS[layout].world_size, update_on_rank, folder, LAYOUTS[layout], old, True)[0]
    assert min(float((alone[name] - start[name]).abs().max()) for name in alone) > 1e-4
    errors = {name: relative_error(found[name], alone[name].double()) for name in alone}
    assert max(errors.values()) < 1e-5, {name: error for name, error in errors.items() if error >= 1e-5}


def test_a_frozen_router_does_not_move_and_all_else_does(folders, truth):
    folder = folders["qwen3_moe"]
    start = load_file(folder / "model.safetensors")
    parallel = LAYOUTS["dp2-ep2"]
    found = run_ranks(2, update_on_rank, folder, parallel, truth["qwen3_moe"][2], False)[0]
    moved = {name: bool((found[name] != start[name]).any()) for name in start}
    assert {name for name, has_moved in moved.items() if not has_moved} == {
        name for name in start if name.endswith("mlp.gate.weight")
    }
