"""The routers of a model chunk: their weights, and the replay of the experts that they chose.

The update has to send each token to the experts that the old log-probs were computed with. Otherwise a token near the
boundary of two experts, or another order of the same experts, changes the log-ratio before any weight has changed, and
FutureKL sums that over all later tokens. So the pass of the old log-probs records the routes of every micro-batch, and the
passes of the update replay them: the experts are fixed, their weights come from the router's current scores, and gradients
flow through these.

    pass of the old log-probs   record   forward: keep [T, k] per layer and micro-batch
    mini-step, forward          replay   forward: read them
    mini-step, backward         replay   recomputed layers read them again, in the order of the forward passes

T tokens of this rank (with sequence parallelism its share of them), k experts per token. Routes are cut with the tokens, so
they never cross ranks. They take 1 byte per token, layer and chosen expert up to 255 experts, else 2, on the device: 384
bytes per token of Qwen3-30B-A3B, 0.1 % of its activations.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router_replay import RouterReplay

Routes = list[torch.Tensor]
"""Of one micro-batch in one model chunk: `route_dtype` [T, k] per layer with experts."""


def route_dtype(experts: int) -> torch.dtype:
    """The dtype of routes to that many experts. Its largest number is no expert: `missing_route`."""
    return torch.uint8 if experts <= torch.iinfo(torch.uint8).max else torch.int16


def missing_route(dtype: torch.dtype) -> int:
    """The number that stands for a token whose experts are not known; the router chooses them."""
    return torch.iinfo(dtype).max


def router_weights(chunk: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """The weights [experts, H] of the chunk's routers, by layer."""
    for layer in _layers_with_experts(chunk):
        yield layer.router.weight


class ChunkRouting:
    """Records and replays the routes of one model chunk, one micro-batch at a time.

    Megatron-Core's schedules run the backward passes of a chunk in the order of its forward passes, so what recomputed layers
    need is the oldest that was not read yet.
    """

    def __init__(self, chunk: torch.nn.Module) -> None:
        self._layers = [_LayerReplay() for _ in _layers_with_experts(chunk)]
        for layer, replay in zip(_layers_with_experts(chunk), self._layers, strict=True):
            layer.router.router_replay = replay
        # Its constructor also adds each to a list that is never emptied.
        RouterReplay.clear_global_router_replay_instances()

    @contextmanager
    def record(self, routes: Routes) -> Iterator[None]:
        """Add the routes of the forward pass inside the context to `routes`."""
        for layer in self._layers:
            layer.recorded = routes
        try:
            yield
        finally:
            for layer in self._layers:
                layer.recorded = None

    @contextmanager
    def replay(self, routes: Routes) -> Iterator[None]:
        """Replay `routes` in the forward pass inside the context, and in the recomputation of its layers until `end_step`."""
        for layer, chosen in zip(self._layers, routes, strict=True):
            layer.forward = chosen
            layer.backward.append(chosen)
        try:
            yield
        finally:
            for layer in self._layers:
                layer.forward = None

    def end_step(self) -> None:
        """Forget the routes of backward passes: those of layers that were not recomputed."""
        for layer in self._layers:
            layer.backward.clear()


class _LayerReplay(RouterReplay):
    """What a router asks for its experts. Megatron-Core's own class has no missing routes, and one action for all micro-batches."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: Routes | None = None
        """Where to add the routes of the current forward pass."""
        self.forward: torch.Tensor | None = None
        """The routes of the current forward pass."""
        self.backward: deque[torch.Tensor] = deque()
        """Those of the forward passes whose backward pass is still to come, the oldest first."""

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(scores [T, k] of the chosen experts, their indices int64 [T, k]) from the scores [T, experts] of all."""
        assert default_compute_topk is not None
        routes = self.forward
        if routes is None and self.backward:
            routes = self.backward.popleft()
        if routes is None:
            values, chosen = default_compute_topk(scores, topk, num_groups, group_topk)
            if self.recorded is not None:
                self.recorded.append(chosen.to(route_dtype(scores.shape[1])))
            return values, chosen
        # Without a branch on the device's values: the router's own choice costs one top-k of [T, experts].
        chosen = routes.long()
        missing = chosen[:, :1] == missing_route(routes.dtype)
        live = default_compute_topk(scores.detach(), topk, num_groups, group_topk)[1]
        chosen = torch.where(missing, live, chosen)
        return scores.gather(1, chosen), chosen


def _layers_with_experts(chunk: torch.nn.Module) -> list[Any]:
    """The `MoELayer`s of a chunk (wrapped or not), in the order of its layers."""
    return [module for module in chunk.modules() if isinstance(module, MoELayer)]
