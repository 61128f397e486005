"""Which experts the updates use: the recorded ones, those of the rollout engine, or the router's choice; over real ranks."""

import tempfile
from collections import deque
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo  # imported once, before the ranks are forked

from megatron_fipo.batching.trajectory import Trajectory
from megatron_fipo.errors import UserError
from megatron_fipo.model.routing import router_weights
from megatron_fipo.trainer.iteration_routing import IterationRouting
from tests.distributed.test_experts import LAYOUTS, gradients_of, new_policy, oracle
from tests.distributed.test_policy_grid import (
    COUNT,
    FIPO,
    batch,
    hf_log_probs,
    hf_model,
    make_shards,
    relative_error,
)
from tests.distributed.tiny import settings, write_model
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as parent:
        yield write_model(Path(parent) / "model", family="qwen3_moe")


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
def test_replay_keeps_the_routes_of_the_old_log_probs_when_the_router_moves(folder, layout):
    """The gradient is that of an oracle with frozen routes; without replay it is that of an oracle which chooses again."""
    parallel, frozen = LAYOUTS[layout], FrozenRoutes()
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
def test_the_auxiliary_loss_spreads_tokens_over_experts_and_is_off_by_default(folder, layout):
    parallel = LAYOUTS[layout]
    loads = {
        coefficient: run_ranks(parallel.world_size, balance, folder, parallel, coefficient)[0]
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
def test_routes_of_the_engine_reach_their_tokens_in_every_layout(folder, layout):
    """Packing, context and sequence parallelism, and stages cut them with the tokens; impossible routes count as missing."""
    parallel, trajectories, forced = LAYOUTS[layout], routed_batch(), FrozenRoutes()
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


def test_an_engine_that_reports_no_routes_is_an_error_on_every_rank(folder):
    run_ranks(2, without_any_route, folder, LAYOUTS["dp2-ep2"])
