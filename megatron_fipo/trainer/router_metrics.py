"""How the routers spread tokens over experts: counts on the ranks, merged once per iteration, and the metrics from them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.model.routing import ChunkRouting, RankRoutes, missing_route


@dataclass
class RouterCounts:
    """Of the tokens of an iteration, padding included, on this rank until `merge`."""

    experts: Tensor
    """float64 [layers, experts]: tokens that each expert processes; zero in layers without experts."""
    tokens: Tensor
    """float64 [layers]: tokens whose route is replayed."""
    missing: Tensor
    """float64 [layers]: those of them for which the rollout engine reported no experts."""
    differing: Tensor
    """float64 [layers]: those of them for which the router would have chosen other experts than the engine."""

    @staticmethod
    def zeros(layers: int, experts: int, device: torch.device) -> "RouterCounts":
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return RouterCounts(zeros(layers, experts), zeros(layers), zeros(layers), zeros(layers))

    def add(self, routing: Sequence[ChunkRouting], chosen: Sequence[RankRoutes]) -> None:
        """Count the routers' own choices of some micro-batches. No wait for the device."""
        for of_chunks in chosen:
            for chunk, routes in zip(routing, of_chunks, strict=True):
                for layer, experts in zip(chunk.layers, routes, strict=True):
                    indices = experts.flatten().long()
                    ones = torch.ones_like(indices, dtype=self.experts.dtype)
                    self.experts[layer].scatter_add_(0, indices, ones)

    def compare(
        self, routing: Sequence[ChunkRouting], replayed: Sequence[RankRoutes], chosen: Sequence[RankRoutes]
    ) -> None:
        """Compare routes of the rollout engine with the routers' own choices. No wait for the device."""
        for given, own in zip(replayed, chosen, strict=True):
            for chunk, of_engine, of_router in zip(routing, given, own, strict=True):
                for layer, engine, router in zip(chunk.layers, of_engine, of_router, strict=True):
                    missing = engine[:, 0] == missing_route(engine.dtype)
                    same = (engine.sort(dim=1).values == router.sort(dim=1).values).all(dim=1)
                    self.tokens[layer] += len(engine)
                    self.missing[layer] += missing.sum()
                    self.differing[layer] += (~same & ~missing).sum()

    def merge(self) -> None:
        """Sum over all ranks: each has other tokens or other layers.

        Collective over the world: one all-reduce of 8 · layers · (experts + 3) bytes.
        """
        columns = [self.experts, *(part[:, None] for part in (self.tokens, self.missing, self.differing))]
        merged = torch.cat(columns, dim=1)
        dist.all_reduce(merged)
        self.experts, (self.tokens, self.missing, self.differing) = merged[:, :-3], merged[:, -3:].T

    def metrics(self) -> dict[str, float]:
        """Of merged counts. Loads are relative to the mean of their layer: 1 is an even spread.

        The first two are means over layers. The others exist with routes of the rollout engine only.
        """
        loads = self.experts[self.experts.sum(dim=1) > 0]
        loads = loads / loads.mean(dim=1, keepdim=True)
        values = {
            "router/load_max": loads.max(dim=1).values.mean().item(),
            "router/load_min": loads.min(dim=1).values.mean().item(),
        }
        if tokens := self.tokens.sum().item():
            missing = self.missing.sum().item()
            values["router/missing"] = missing / tokens
            values["router/differing"] = self.differing.sum().item() / max(tokens - missing, 1.0)
        return values
