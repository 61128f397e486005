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

from megatron_fipo.model.mcore import layer_of

Routes = list[torch.Tensor]
"""Of one micro-batch in one model chunk: `route_dtype` [T, k] per layer with experts."""
RankRoutes = list[Routes]
"""Of one micro-batch, for each model chunk of a rank."""


def route_dtype(experts: int) -> torch.dtype:
    """The dtype of routes to that many experts. Its largest number is no expert: `missing_route`."""
    return torch.uint8 if experts <= torch.iinfo(torch.uint8).max else torch.int16


def missing_route(dtype: torch.dtype) -> int:
    """The number that stands for a token whose experts are not known; the router chooses them."""
    return torch.iinfo(dtype).max


def usable_routes(routes: torch.Tensor, experts: int) -> torch.Tensor:
    """Routes of another program, integers [T, k], as `route_dtype` [T, k]: those that no router can have chosen are missing.

    These are unknown ones (-1), experts that do not exist, and one expert twice: a buffer that was never written has expert 0
    k times. No wait for the device.
    """
    ordered = routes.sort(dim=1).values
    impossible = (ordered[:, :1] < 0) | (ordered[:, -1:] >= experts)
    impossible |= (ordered[:, 1:] == ordered[:, :-1]).any(dim=1, keepdim=True)
    dtype = route_dtype(experts)
    return routes.masked_fill(impossible, missing_route(dtype)).to(dtype)


def filled(routes: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """`routes` [T, k] with the router's own choice [T, k] for tokens whose route is missing; in the dtype of `own`."""
    return torch.where(routes[:, :1] == missing_route(routes.dtype), own, routes.to(own.dtype))


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
        modules = _layers_with_experts(chunk)
        self.layers = [layer_of(module) for module in modules]
        """The layers with experts, counted from 0 over all pipeline stages."""
        self._layers = [_LayerReplay() for _ in modules]
        for module, replay in zip(modules, self._layers, strict=True):
            module.router.router_replay = replay
        # Its constructor also adds each to a list that is never emptied.
        RouterReplay.clear_global_router_replay_instances()

    @contextmanager
    def forward(self, replayed: Routes | None, chosen: Routes | None) -> Iterator[None]:
        """The forward pass inside the context uses the routes `replayed`, and adds the routers' own choices to `chosen`.

        With gradients, the recomputation of its layers uses `replayed` too, until `end_step`.
        """
        for index, layer in enumerate(self._layers):
            layer.chosen = chosen
            layer.forward = None if replayed is None else replayed[index]
            if layer.forward is not None and torch.is_grad_enabled():
                layer.backward.append(layer.forward)
        try:
            yield
        finally:
            for layer in self._layers:
                layer.forward = layer.chosen = None

    def end_step(self) -> None:
        """Forget the routes of backward passes: those of layers that were not recomputed."""
        for layer in self._layers:
            layer.backward.clear()


class _LayerReplay(RouterReplay):
    """What a router asks for its experts. Megatron-Core's own class has no missing routes, and one action for all micro-batches."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen: Routes | None = None
        """Where to add this router's choices in the current forward pass."""
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
        # A replay computes the router's own choice too, so that missing routes need no branch on the device's values.
        values, own = default_compute_topk(scores, topk, num_groups, group_topk)
        if self.chosen is not None:
            self.chosen.append(own.to(route_dtype(scores.shape[1])))
        if routes is None:
            return values, own
        chosen = filled(routes, own)
        return scores.gather(1, chosen), chosen


def _layers_with_experts(chunk: torch.nn.Module) -> list[Any]:
    """The `MoELayer`s of a chunk (wrapped or not), in the order of its layers."""
    return [module for module in chunk.modules() if isinstance(module, MoELayer)]
