"""The routes of one iteration on one rank: recorded with the old log-probs, replayed in every mini-step."""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

from collections.abc import Sequence

import torch
from megatron.core import parallel_state

from megatron_fipo.batching.shard import PackedShard
from megatron_fipo.errors import UserError
from megatron_fipo.model.routing import RankRoutes, filled, usable_routes
from megatron_fipo.trainer.rank_model import RankModel
from megatron_fipo.trainer.router_metrics import RouterCounts


class IterationRouting:
    """What `model.router.replay` does in an iteration. Without experts nothing.

    With `rollout` the pass of the old log-probs replays the rollout engine's routes, and the routers choose for tokens without
    one. The updates replay what that pass used, so the first mini-step still reproduces the old log-probs bit for bit.
    """

    def __init__(self, policy: RankModel, replay: str) -> None:
        self._policy, self._replay = policy, replay
        self._used: dict[int, list[RankRoutes]] = {}
        """By mini-step: the routes of each micro-batch in the pass of the old log-probs."""
        experts, layers = policy.architecture.experts, policy.architecture.num_layers
        self._counts = None if experts is None else RouterCounts.zeros(layers, experts.count, policy.device)

    def log_probs(self, step: int, shards: Sequence[PackedShard]) -> list[torch.Tensor]:
        """The old log-probs of a mini-step, as `RankModel.log_probs`."""
        policy = self._policy
        if self._counts is None:
            return policy.log_probs(shards)
        chosen = policy.new_routes(shards)
        engine = [_engine_routes(policy, shard) for shard in shards] if self._replay == "rollout" else None
        values = policy.log_probs(shards, engine, chosen)
        self._counts.add(policy.routing, chosen)
        if engine is not None:
            self._counts.compare(policy.routing, engine, chosen)
        if self._replay != "none":
            self._used[step] = chosen if engine is None else _filled(engine, chosen)
        return values

    def replayed(self, step: int) -> list[RankRoutes] | None:
        """The routes of a mini-step for `RankModel.policy_step`; None if the routers choose again."""
        return self._used.get(step)

    def finish_scoring(self) -> dict[str, float]:
        """The metrics, on every rank, after the last `log_probs`. Collective over the world with experts: `RouterCounts.merge`.

        UserError on every rank if routes of the rollout engine were to be replayed and it reported none.
        """
        if self._counts is None:
            return {}
        self._counts.merge()
        metrics = self._counts.metrics()
        if metrics.get("router/missing") == 1.0:
            raise UserError(
                "model.router.replay=rollout, but no response of this iteration has the routes of its rollout engine; set "
                "model.router.replay=old_log_probs (dumps of --replay have no routes either)"
            )
        return metrics


def _engine_routes(policy: RankModel, shard: PackedShard) -> RankRoutes:
    """The rollout engine's routes in one micro-batch: of this rank's layers and, with sequence parallelism, its tokens."""
    experts, tokens = policy.architecture.experts, shard.input_ids.shape[1]
    assert experts is not None
    shape = (tokens, policy.architecture.num_layers, experts.per_token)
    routes = shard.routes
    if routes is None:
        routes = torch.full(shape, -1, dtype=torch.int16, device=policy.device)
    if routes.shape != shape:
        raise UserError(
            f"the rollout engine reports routes of {list(routes.shape[1:])} layers and experts per token, but the model has "
            f"{list(shape[1:])}; both have to use the same model"
        )
    if policy.model_config.sequence_parallel:
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        routes = routes.chunk(ranks)[parallel_state.get_tensor_model_parallel_rank()]
    return [
        [usable_routes(routes[:, layer], experts.count) for layer in chunk.layers] for chunk in policy.routing
    ]


def _filled(engine: Sequence[RankRoutes], chosen: Sequence[RankRoutes]) -> list[RankRoutes]:
    """The engine's routes, with the router's own choice for the tokens that have none."""
    return [
        [
            [filled(given, own) for given, own in zip(*chunk, strict=True)]
            for chunk in zip(*micro_batch, strict=True)
        ]
        for micro_batch in zip(engine, chosen, strict=True)
    ]
