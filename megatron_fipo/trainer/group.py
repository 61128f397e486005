"""The trainer's ranks as Ray actors: placed together, called together, ended together."""

from collections.abc import Callable
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from megatron_fipo.errors import UserError
from megatron_fipo.rollout.protocol import RAY_LOGS


class TrainerGroup:
    """`world_size` actors of one worker class. A method is called on all ranks at once; results come back by rank.

    A rank that dies leaves the others waiting inside a collective, so the first failure kills the whole group and is raised.
    """

    def __init__(
        self, worker_class: type, world_size: int, gpus_per_rank: int, gpu_share: float = 1.0, **worker_arguments: Any
    ) -> None:
        """Start the ranks. Each reserves `gpus_per_rank` GPUs and takes `gpu_share` of them, leaving the rest to a colocated engine."""
        bundle = {"CPU": 1, "GPU": gpus_per_rank} if gpus_per_rank else {"CPU": 1}
        self.placement: PlacementGroup = placement_group([bundle] * world_size, strategy="PACK")
        try:
            ray.get(self.placement.ready(), timeout=60)
        except ray.exceptions.GetTimeoutError:
            remove_placement_group(self.placement)
            raise UserError(
                f"Ray found no room for {world_size} trainer ranks ({bundle} each) within 60 s; lower the parallel sizes or add nodes."
            ) from None
        remote: Any = ray.remote(worker_class)
        self.actors: list[ActorHandle] = [
            remote.options(
                num_cpus=1,
                num_gpus=gpus_per_rank * gpu_share,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.placement, placement_group_bundle_index=bundle_index),
            ).remote(rank=rank, world_size=world_size, **worker_arguments)
            for rank, bundle_index in enumerate(_node_by_node(self.placement))
        ]
        rendezvous: Any = ray.get(self.actors[0].rendezvous.remote())
        self.call("setup", rendezvous)

    def call(self, method: str, *arguments: Any, meanwhile: Callable[[], None] | None = None) -> list[Any]:
        """Run `method` on every rank and wait for all. Large arguments should be object references.

        `meanwhile` is called again and again until all ranks are done; it should take a fraction of a second.
        """
        pending = {getattr(actor, method).remote(*arguments): rank for rank, actor in enumerate(self.actors)}
        results: dict[int, Any] = {}
        waiting = list(pending)
        while waiting:
            finished, waiting = ray.wait(waiting, num_returns=1, timeout=None if meanwhile is None else 0)
            if not finished:
                assert meanwhile is not None
                meanwhile()
                continue
            (done,) = finished
            rank = pending[done]
            try:
                results[rank] = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                self.shutdown()
                if isinstance(error.cause, UserError):
                    raise error.cause from None
                raise RuntimeError(f"trainer rank {rank} failed in {method}: {error.cause}") from error
            except ray.exceptions.RayActorError as error:
                self.shutdown()
                raise UserError(
                    f"trainer rank {rank} died in {method} (see {RAY_LOGS}); run the same command to go on from the last checkpoint"
                ) from error
        return [results[rank] for rank in range(len(self.actors))]

    def shutdown(self) -> None:
        for actor in self.actors:
            ray.kill(actor)
        remove_placement_group(self.placement)


def _node_by_node(placement: PlacementGroup) -> list[int]:
    """Bundle indices ordered so that neighbours share a node: tensor-parallel ranks are consecutive and talk the most."""
    nodes = placement_group_table(placement)["bundles_to_node_id"]
    return sorted(nodes, key=lambda bundle: (nodes[bundle], bundle))
