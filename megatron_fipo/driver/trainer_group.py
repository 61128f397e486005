"""The trainer's ranks as Ray actors: placed together, called together, ended together."""

import logging
from collections.abc import Callable
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from megatron_fipo.driver.placement import node_by_node, reserve
from megatron_fipo.errors import RAY_LOGS, UserError, first_line

_logger = logging.getLogger(__name__)


class TrainerLostError(UserError):
    """A rank died or failed, and the whole group with it: nothing more can be trained or saved in this process."""


class TrainerGroup:
    """`world_size` actors of one worker class. A method is called on all ranks at once; results come back by rank.

    A rank that dies leaves the others waiting inside a collective, so the first failure kills the whole group. It is raised as
    `TrainerLostError`, and again by every later call.
    """

    def __init__(
        self,
        worker_class: type,
        world_size: int,
        gpus_per_rank: int,
        gpu_share: float = 1.0,
        **worker_arguments: Any,
    ) -> None:
        """Start the ranks. Each reserves `gpus_per_rank` GPUs and takes `gpu_share` of them, leaving the rest to a colocated engine.

        Raises `UserError` where there is no room for them; then, or when a rank fails, nothing stays reserved.
        """
        self._failure: TrainerLostError | None = None
        bundle = {"CPU": 1, "GPU": gpus_per_rank} if gpus_per_rank else {"CPU": 1}
        self.placement: PlacementGroup = reserve(
            bundle, world_size, "trainer ranks", "lower the parallel sizes"
        )
        remote: Any = ray.remote(worker_class)
        self.actors: list[ActorHandle] = [
            remote.options(
                num_cpus=1,
                num_gpus=gpus_per_rank * gpu_share,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self.placement, placement_group_bundle_index=bundle_index
                ),
            ).remote(rank=rank, world_size=world_size, **worker_arguments)
            for rank, bundle_index in enumerate(node_by_node(self.placement))
        ]
        rendezvous = self._result(0, "rendezvous", self.actors[0].rendezvous.remote())
        self.call("setup", rendezvous)

    def call(self, method: str, *arguments: Any, meanwhile: Callable[[], None] | None = None) -> list[Any]:
        """Run `method` on every rank and wait for all. Large arguments should be object references.

        `meanwhile` is called again and again until all ranks are done; it should take a fraction of a second. Raises
        `TrainerLostError` with the first failure of the group, whichever call that was in.
        """
        if self._failure is not None:
            raise self._failure
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
            results[pending[done]] = self._result(pending[done], method, done)
        return [results[rank] for rank in range(len(self.actors))]

    def shutdown(self) -> None:
        for actor in self.actors:
            ray.kill(actor)
        remove_placement_group(self.placement)

    def _result(self, rank: int, method: str, reference: Any) -> Any:
        """What the rank answered; its failure ends the group."""
        try:
            return ray.get(reference)
        except ray.exceptions.RayError as error:
            self._failure = _describe(rank, method, error)
            self.shutdown()
            raise self._failure from error


def _describe(rank: int, method: str, error: ray.exceptions.RayError) -> TrainerLostError:
    if not isinstance(error, ray.exceptions.RayTaskError):
        return TrainerLostError(
            f"trainer rank {rank} died in {method} ({first_line(error)}; see {RAY_LOGS}); run the same command to go on from the last "
            "checkpoint"
        )
    cause = error.cause
    if isinstance(cause, UserError):
        return TrainerLostError(str(cause))
    _logger.error("%s", error)  # the rank's traceback, which the sentence would hide
    return TrainerLostError(
        f"trainer rank {rank} failed in {method}: {type(cause).__name__}: {first_line(cause)}"
    )
