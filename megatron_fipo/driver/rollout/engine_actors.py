"""Engines as Ray actors: their placement, and restarting each one on the same bundle."""

from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from megatron_fipo.driver.cluster_loss import is_lost
from megatron_fipo.driver.placement import (
    PLACEMENT_TIMEOUT_S,
    engine_bundles,
    node_by_node,
    nodes,
    reserve,
)
from megatron_fipo.errors import UserError

COLOCATED_GPU_SHARE = 0.5
"""Share of a GPU, in Ray's bookkeeping, of a colocated engine; the trainer rank on that GPU leaves it free.
Not a share of memory."""
CONTROL_CALLS = 4
"""Concurrent calls to an engine besides `generate`: a health probe, an abort, two buckets of weights."""


class EngineActors:
    """Handles of `size` actors of one engine class, by number.

    Each has its own bundle of a placement group, also after a restart.
    """

    def __init__(
        self,
        engine_class: Any,
        engine_kwargs: dict[str, Any],
        size: int,
        *,
        gpus_per_engine: int,
        calls_at_once: int | None = None,
        trainer_placement: PlacementGroup | None = None,
        placement_timeout_s: float = PLACEMENT_TIMEOUT_S,
    ) -> None:
        """Reserve the bundles (1 CPU and `gpus_per_engine` GPUs each); no actor is started yet.

        If no node has so many GPUs, an engine spans nodes (argument `spans_nodes` of the engine class): it has a placement
        group of its own, with a bundle of one GPU for each of its workers, and is in the first without taking the GPU.

        Up to `calls_at_once` calls of `generate` run concurrently, as many as the class names if None.

        With `trainer_placement` (one bundle with one GPU per trainer rank) engines run in the trainer's
        bundles instead, each with `COLOCATED_GPU_SHARE` of the GPU there, which the rank must leave free.
        Raises `UserError` if the cluster has no space.
        """
        self._arguments = engine_kwargs
        self._own: dict[int | None, PlacementGroup] = {}
        """Reserved here: by engine if they span nodes, else one for all (None)."""
        self._spanning: list[dict[str, int]] = []
        self._timeout_s = placement_timeout_s
        self._options: dict[str, Any] = {
            "max_concurrency": (calls_at_once or engine_class.calls_at_once) + CONTROL_CALLS
        }
        if trainer_placement is None:
            bundles = engine_bundles(gpus_per_engine, nodes())
            if len(bundles) > 1:
                self._spanning = bundles
                self._arguments = engine_kwargs | {"spans_nodes": True}
                self._options |= {"num_cpus": 1, "num_gpus": 0}
                for number in range(size):
                    self._reserve_spanning(number)
            else:
                fix = "lower rollout.num_engines"
                self._own[None] = reserve(bundles[0], size, "rollout engines", fix, placement_timeout_s)
                self._placement = self._own[None]
                self._bundles = list(range(size))
                self._options |= {"num_cpus": 1, "num_gpus": gpus_per_engine}
        else:
            self._placement, self._bundles = trainer_placement, node_by_node(trainer_placement)
            if gpus_per_engine > 1 or size > len(self._bundles):
                raise UserError(
                    f"rollout.placement=colocated puts an engine on one GPU of one trainer rank, so {size} "
                    f"engines of {gpus_per_engine} GPUs do not fit {len(self._bundles)} ranks; lower "
                    "rollout.num_engines or rollout.engine_tensor_parallel_size, or choose "
                    "rollout.placement=separate"
                )
            self._options |= {"num_cpus": 0, "num_gpus": COLOCATED_GPU_SHARE if gpus_per_engine else 0}
        self._actor_class: Any = ray.remote(engine_class)
        self._handles: dict[int, ActorHandle] = {}

    def __getitem__(self, number: int) -> ActorHandle:
        return self._handles[number]

    def start(self, number: int) -> None:
        """Start an actor; returns at once.

        After a kill, Ray waits until the old actor's resources are free.
        """
        if self._spanning:
            if number not in self._own:
                self._reserve_spanning(number)
            strategy = PlacementGroupSchedulingStrategy(
                self._own[number],
                placement_group_bundle_index=0,
                placement_group_capture_child_tasks=True,  # vLLM's workers
            )
        else:
            strategy = PlacementGroupSchedulingStrategy(
                self._placement, placement_group_bundle_index=self._bundles[number]
            )
        self._handles[number] = self._actor_class.options(
            **self._options, scheduling_strategy=strategy
        ).remote(**self._arguments)

    def kill(self, number: int) -> None:
        """End the actor, including one whose process is dead, hangs or was stopped."""
        ray.kill(self._handles.pop(number))
        if self._spanning:  # its workers are actors of their own, which end with their placement group
            remove_placement_group(self._own.pop(number))

    def shutdown(self) -> None:
        """End all actors and release the bundles reserved here."""
        if is_lost():
            return
        for number in list(self._handles):
            self.kill(number)
        for placement in self._own.values():
            remove_placement_group(placement)

    def _reserve_spanning(self, number: int) -> None:
        self._own[number] = reserve(
            self._spanning[0],
            len(self._spanning),
            f"workers of rollout engine {number}",
            "lower rollout.num_engines or rollout.engine_tensor_parallel_size",
            self._timeout_s,
        )
