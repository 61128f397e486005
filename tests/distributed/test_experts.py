"""Experts over real ranks: no layout may change a loss, a gradient or a route, and the update uses the routes of the old log-probs.

The reference is that of `test_policy_grid.py`: transformers' Qwen3-MoE in float64, one sequence at a time, and plain autograd.
"""

import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo  # imported once, before the ranks are forked
from safetensors.torch import load_file

from megatron_fipo.batching.trajectory import Trajectory
from megatron_fipo.config import ParallelConfig, RouterConfig
from megatron_fipo.errors import UserError
from megatron_fipo.families.fused_experts import separate
from megatron_fipo.model import parallel as model_parallel
from megatron_fipo.model.routing import router_weights
from megatron_fipo.trainer.iteration_routing import IterationRouting
from megatron_fipo.trainer.rank_model import RankModel
from tests.distributed.test_policy_grid import (
    COUNT,
    FIPO,
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


class FrozenRoutes:
    """Records the routes of every call of a transformers model's routers, and replays them in the same order."""

    def __init__(self) -> None:
        self.routes: deque[torch.Tensor] = deque()

    def record(self, model: Any) -> None:
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(lambda gate, inputs, output: self.routes.append(output[2]))

    def replay_moved(self, model: Any) -> None:
        """With other routers."""
        move_routers(model)
        self.replay(model)

    def replay(self, model: Any) -> None:
        for layer in model.model.layers:
            layer.mlp.gate.forward = partial(self._forward, layer.mlp.gate)

    def _forward(self, gate: Any, hidden: torch.Tensor):
        logits = torch.nn.functional.linear(hidden.reshape(-1, gate.hidden_dim), gate.weight)
        own, given = logits.topk(gate.top_k, dim=1).indices, self.routes.popleft()
        chosen = torch.where(given < 0, own, given)
        weights = logits.softmax(dim=-1).gather(1, chosen)
        return logits, weights / weights.sum(dim=-1, keepdim=True), chosen


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
    found = results[0][2]
    assert set(found) == set(gradients)
    assert all(gradients[weight].abs().max() > 0 for weight in gradients if "mlp.gate" in weight)
    errors = {weight: relative_error(found[weight], gradients[weight]) for weight in gradients}
    assert max(errors.values()) < 1e-5, {weight: error for weight, error in errors.items() if error >= 1e-5}
    norm = float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())
    for statistics, grad_norm, _ in results:
        assert grad_norm == pytest.approx(norm, rel=1e-5)
        if statistics:
            assert statistics["policy/loss"] == pytest.approx(loss, rel=1e-5)


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


def step_with_another_router(rank, world_size, folder, parallel, old, replay):
    """Record routes, then exchange the rows of every router so that it chooses others, then one step at learning rate 0."""
    policy = new_policy(folder, parallel, recompute="full", trainable=True, distributed=False)
    shards = make_shards(policy, parallel, batch()[0], old, 160)
    routes, live = policy.new_routes(shards), policy.new_routes(shards)
    policy.log_probs(shards, chosen=routes)
    with torch.no_grad():
        for module in policy.modules:
            for weight in router_weights(module):
                weight.copy_(weight.roll(1, dims=0))
    policy.log_probs(shards, chosen=live)
    pairs = zip(all_routes(routes), all_routes(live), strict=True)
    changed = any(bool((one.sort(dim=1).values != other.sort(dim=1).values).any()) for one, other in pairs)
    result = policy.policy_step(shards, FIPO, lr=0.0, replayed=routes if replay else None)
    return changed, result.statistics, gradients_of(policy)


def all_routes(routes) -> list[torch.Tensor]:
    return [layer for micro_batch in routes for chunk in micro_batch for layer in chunk]


@pytest.mark.parametrize("layout", ["1", "tp2-ep2", "pp2-vpp2-cp2-ep2"])
def test_replay_keeps_the_routes_of_the_old_log_probs_when_the_router_moves(folders, layout):
    """The gradient is that of an oracle with frozen routes; without replay it is that of an oracle which chooses again."""
    folder, parallel, frozen = folders["qwen3_moe"], LAYOUTS[layout], FrozenRoutes()
    oracle(folder, frozen.record)
    recorded = len(frozen.routes)
    expected = {True: oracle(folder, frozen.replay_moved), False: oracle(folder, move_routers)}
    assert recorded == 4 * COUNT
    assert not frozen.routes
    assert relative_error(*(expected[replay][1]["lm_head.weight"] for replay in (True, False))) > 1e-2
    for replay, (loss, gradients, old) in expected.items():
        results = run_ranks(parallel.world_size, step_with_another_router, folder, parallel, old, replay)
        assert all(changed for changed, _, _ in results)
        found = results[0][2]
        errors = {weight: relative_error(found[weight], gradients[weight]) for weight in gradients}
        assert max(errors.values()) < 1e-5, {w: error for w, error in errors.items() if error >= 1e-5}
        assert next(s["policy/loss"] for _, s, _ in results if s) == pytest.approx(loss, rel=1e-5)


def move_routers(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.gate.weight.data = layer.mlp.gate.weight.data.roll(1, dims=0)


def balance(rank, world_size, folder, parallel, load_balancing):
    """Largest load of an expert before and after some steps without any advantage."""
    policy = new_policy(folder, parallel, trainable=True, load_balancing=load_balancing)
    trajectories = [replace(trajectory, advantage=0.0) for trajectory in batch()[0]]
    zeros = [np.zeros(64, dtype=np.float32)] * COUNT
    shards = make_shards(policy, parallel, trajectories, zeros, 160)

    def load_and_scores():
        routing = IterationRouting(policy, "none")
        scores = routing.log_probs(0, shards)
        return routing.finish_scoring()["router/load_max"], scores

    before, scores = load_and_scores()
    if policy.is_last_stage:
        shards = [shard.with_old_log_probs(values) for shard, values in zip(shards, scores, strict=True)]
    for _ in range(8):
        policy.policy_step(shards, FIPO, lr=1e-2)
    return before, load_and_scores()[0]


@pytest.mark.parametrize("layout", ["1", "tp2-ep2"])
def test_the_auxiliary_loss_spreads_tokens_over_experts_and_is_off_by_default(folders, layout):
    parallel = LAYOUTS[layout]
    loads = {
        coefficient: run_ranks(parallel.world_size, balance, folders["qwen3_moe"], parallel, coefficient)[0]
        for coefficient in (0.0, 1.0)
    }
    assert loads[0.0][1] == pytest.approx(loads[0.0][0], rel=0.02)
    assert loads[1.0][0] == loads[0.0][0]
    assert loads[1.0][1] - 1 < 0.7 * (loads[1.0][0] - 1)


def routed_batch() -> list[Trajectory]:
    """The batch with routes of an engine that chose experts at random; one response has none, and some tokens have impossible ones."""
    trajectories, rng = batch()[0], np.random.default_rng(5)
    for index, trajectory in enumerate(trajectories):
        shape = (trajectory.length - 1, 4, 4)
        routes = rng.permuted(np.broadcast_to(np.arange(4, dtype=np.uint8), shape), axis=2)[:, :, :2]
        if index % 4 == 1:
            routes[::3, 2] = 0
        trajectory.routes = None if index == 3 else routes
    return trajectories


def score_with_engine_routes(rank, world_size, folder, parallel):
    """Old log-probs with the engine's routes, then one step: log-probs by sequence on this rank, statistics, metrics."""
    policy = new_policy(folder, parallel, recompute="full")
    zeros = [np.zeros(64, dtype=np.float32)] * COUNT
    shards = make_shards(policy, parallel, routed_batch(), zeros, 160)
    routing = IterationRouting(policy, "rollout")
    scores = routing.log_probs(0, shards)
    metrics = routing.finish_scoring()
    found = []
    if policy.is_last_stage:
        found = [shard.scatter_rows(values) for shard, values in zip(shards, scores, strict=True)]
        shards = [shard.with_old_log_probs(values) for shard, values in zip(shards, scores, strict=True)]
    statistics = policy.policy_step(shards, FIPO, lr=1e-3, replayed=routing.replayed(0)).statistics
    return found, statistics, metrics


@pytest.mark.parametrize("layout", ["1", "cp2-ep2", "tp2-ep2", "pp2-vpp2-cp2-ep2", "tp2-cp2-ep2-etp2"])
def test_routes_of_the_engine_reach_their_tokens_in_every_layout(folders, layout):
    """Packing, context and sequence parallelism, and stages cut them with the tokens; impossible routes count as missing."""
    folder, parallel, trajectories, forced = (
        folders["qwen3_moe"],
        LAYOUTS[layout],
        routed_batch(),
        FrozenRoutes(),
    )
    model = hf_model(folder)
    forced.replay(model)
    missing = total = 0
    for trajectory in trajectories:
        routes = torch.full((trajectory.length, 4, 2), -1)
        if trajectory.routes is not None:
            given = torch.from_numpy(trajectory.routes.astype(np.int64))
            given[given[:, :, 0] == given[:, :, 1]] = -1
            routes[:-1] = given
        missing, total = missing + int((routes[:, :, 0] < 0).sum()), total + routes[:, :, 0].numel()
        forced.routes.extend(routes.unbind(dim=1))
    with torch.no_grad():
        scored = hf_log_probs(model, trajectories, settings(folder, parallel)["temperature"])
    results = run_ranks(parallel.world_size, score_with_engine_routes, folder, parallel)
    expected = {
        trajectory.response_ids.tobytes(): log_probs
        for trajectory, (log_probs, _) in zip(trajectories, scored, strict=True)
    }
    plan = [members for found, _, _ in results for micro_batch in found for members in micro_batch]
    tokens = [len(values) for values in plan]
    assert sorted(set(tokens)) == sorted({len(values) for values in expected.values()})
    for values in plan:
        known = ~np.isnan(values)
        candidates = [e.numpy() for e in expected.values() if len(e) == len(values)]
        assert any(np.allclose(values[known], e[known], atol=2e-5) for e in candidates)
    for _, statistics, metrics in results:
        if statistics:
            assert statistics["policy/sigma_log_ratio"] == 0.0
        assert metrics["router/missing"] >= missing / total  # padding has no routes either
        assert metrics["router/differing"] > 0.5


def without_any_route(rank, world_size, folder, parallel):
    policy = new_policy(folder, parallel)
    zeros = [np.zeros(64, dtype=np.float32)] * COUNT
    routing = IterationRouting(policy, "rollout")
    routing.log_probs(0, make_shards(policy, parallel, batch()[0], zeros, 160))
    with pytest.raises(UserError, match="no response of this iteration has the routes"):
        routing.finish_scoring()


def test_an_engine_that_reports_no_routes_is_an_error_on_every_rank(folders):
    run_ranks(2, without_any_route, folders["qwen3_moe"], LAYOUTS["dp2-ep2"])
