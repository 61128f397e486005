"""The trainer's ranks as Ray actors: placed together, called together, ended together.

`RLTrainer` and `SftTrainer` have one typed method per method of the ranks (`trainer/protocol.py`) and merge
the answers of the ranks into one result.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, NoReturn, ParamSpec, TypeVar, cast

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from megatron_fipo.config import RecoveryConfig
from megatron_fipo.driver.actor_logs import why_it_died
from megatron_fipo.driver.cluster_loss import ERROR_DELAY_S, check_cluster, is_lost
from megatron_fipo.driver.placement import (
    PLACEMENT_TIMEOUT_S,
    node_by_node,
    reserve,
    wait_until_placed,
)
from megatron_fipo.driver.rank_actor import RankActor, TrainerLostError, raised, start_actor, submit
from megatron_fipo.driver.rank_watch import RankWatch
from megatron_fipo.driver.ray_wait import wait_for_one
from megatron_fipo.environment import Accelerators
from megatron_fipo.trainer.protocol import (
    IterationReport,
    PushFailure,
    RankCosts,
    RankSettings,
    RLRank,
    SftRank,
    TokenWeights,
    TrainerRank,
)

if TYPE_CHECKING:
    from megatron_fipo.batching.iteration_batch import IterationBatch
    from megatron_fipo.batching.rank_share import RankShare
    from megatron_fipo.batching.trajectory import Trajectory
    from megatron_fipo.checkpoint.manifest import FileRecord
    from megatron_fipo.config import Config

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Value = TypeVar("Value")
LOOK_EVERY_S = 1.0
"""Seconds between two looks at the ranks while they work."""
PEER_DELAY_S = 5.0
"""Seconds by which a rank may fail before the death of the rank that caused it is seen."""
ABANDONABLE = frozenset(
    method.__name__
    for method in (
        RankActor.start,
        TrainerRank.rendezvous,
        TrainerRank.setup,
        RLRank.check_files,
        RLRank.load,
    )
)
"""Before they have returned there is nothing to save, so the run may stop at once."""


class TrainerGroup:
    """`world_size` ranks of one worker class. A method runs on all ranks at once; results are by rank.

    A rank that dies leaves the others waiting inside a collective, so the first failure ends all of them. It
    is raised as one of the errors of `rank_actor.py`, and again by every later call until `start`.
    """

    def __init__(
        self,
        load_worker: Callable[[], type[TrainerRank]],
        world_size: int,
        gpus_per_rank: int,
        gpu_share: float = 1.0,
        recovery: RecoveryConfig | None = None,
        check: Callable[[], None] = lambda: None,
        placement_timeout_s: float = PLACEMENT_TIMEOUT_S,
        judge: Callable[[list[Accelerators]], None] | None = None,
        **worker_arguments: Any,
    ) -> None:
        """Reserve the resources of the ranks: `gpus_per_rank` GPUs each, of which a rank takes `gpu_share`.

        The rest is for a colocated engine. `load_worker` runs on the rank and imports the worker class.
        `check` is called while the ranks start and load, and may raise. `judge` gets the GPUs that each rank sees before the
        first start builds a model, and may raise.

        Raises `UserError` if the cluster has no space for the ranks.
        """
        self._load_worker = load_worker
        self._arguments = worker_arguments
        self._recovery = recovery or RecoveryConfig()
        self._check = check
        self._judge = judge
        self._failure: Exception | None = None
        self._options = {"num_cpus": 1, "num_gpus": gpus_per_rank * gpu_share}
        self._size = world_size
        bundle = {"CPU": 1, "GPU": gpus_per_rank} if gpus_per_rank else {"CPU": 1}
        self.placement: PlacementGroup = reserve(
            bundle, world_size, "trainer ranks", "lower the parallel sizes", placement_timeout_s
        )
        self.actors: list[ActorHandle] = []
        self._nodes: list[str] = []

    def start(self) -> None:
        """Start the ranks; also again, after ending those that are left. The resources stay reserved meanwhile.

        Raises `NoSpareNodeError` if those of a lost node are not found elsewhere within `recovery.placement_timeout_s`.
        """
        self.end_ranks()
        self._failure, self._nodes = None, []
        wait_until_placed(self.placement, self._recovery.placement_timeout_s, self._check)
        self.actors = [
            start_actor(
                **self._options,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self.placement, placement_group_bundle_index=bundle_index
                ),
            )
            for bundle_index in node_by_node(self.placement)
        ]
        self._watch = RankWatch(self.actors, self._recovery.stall_timeout_s)
        starts = [
            actor.start.remote(self._load_worker, rank=rank, world_size=self._size, **self._arguments)
            for rank, actor in enumerate(self.actors)
        ]
        self._nodes = self._results(starts, RankActor.start.__name__)
        if self._judge is not None:
            self._judge(self.call(TrainerRank.accelerators))
            self._judge = None
        method = TrainerRank.rendezvous.__name__
        (rendezvous,) = self._results([submit(self.actors[0], method)], method)
        self.call(TrainerRank.setup, rendezvous)

    def call(
        self,
        method: Callable[Concatenate[Any, Arguments], Result],
        *arguments: Arguments.args,
        **keywords: Arguments.kwargs,
    ) -> list[Result]:
        """Run `method`, a method of the rank's protocol, on every rank and wait for all.

        Pass large arguments through `put_once`. Raises the first failure of the group, from this call or an
        earlier one.
        """
        return self.call_while(None, method, *arguments, **keywords)

    def call_while(
        self,
        meanwhile: Callable[[], None] | None,
        method: Callable[Concatenate[Any, Arguments], Result],
        *arguments: Arguments.args,
        **keywords: Arguments.kwargs,
    ) -> list[Result]:
        """Also run `meanwhile`, a fraction of a second long, repeatedly until all ranks are done."""
        if self._failure is not None:
            raise self._failure
        name = method.__name__
        calls = [submit(actor, name, *arguments, **keywords) for actor in self.actors]
        return self._results(calls, name, meanwhile)

    def check(self) -> None:
        """Between calls: raises `TrainerLostError` if a rank died or does not answer."""
        if self._failure is not None:
            raise self._failure
        self._end_if_lost((), "no method")

    def describe(self) -> list[str]:
        """What rank 0 runs on, a line for each part."""
        return self.call(TrainerRank.describe)[0]

    def export_hf(self, source: Path, target: Path) -> None:
        """Write the weights as a Hugging Face folder, config and tokenizer from `source`."""
        self.call(TrainerRank.export_hf, str(source), str(target))

    def end_ranks(self) -> None:
        """End all ranks, also those that hang."""
        if not is_lost():
            for actor in self.actors:
                ray.kill(actor)
        self.actors = []

    def shutdown(self) -> None:
        """End all ranks and release their reservation."""
        self.end_ranks()
        if not is_lost():
            remove_placement_group(self.placement)

    def _results(
        self, calls: list[Any], method: str, meanwhile: Callable[[], None] | None = None
    ) -> list[Any]:
        """The answers of all ranks to a call of each, in order of the ranks; the first failure ends the group."""
        results: dict[int, Any] = {}
        waiting = {reference: rank for rank, reference in enumerate(calls)}
        self._watch.began()
        while waiting:
            finished = wait_for_one(list(waiting), LOOK_EVERY_S if meanwhile is None else 0.0)
            if not finished and meanwhile is not None:
                meanwhile()
            for reference in finished:
                rank = waiting.pop(reference)
                results[rank] = self._result(rank, method, reference)
                self._watch.finished(rank)
            self._end_if_lost(waiting.values(), method)
            if method in ABANDONABLE:
                self._check()
        return [results[rank] for rank in range(len(calls))]

    def _result(self, rank: int, method: str, reference: Any) -> Any:
        """The rank's answer; its failure ends the group."""
        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            failure = raised(rank, method, error)
            if isinstance(failure, TrainerLostError):
                check_cluster(ERROR_DELAY_S)
                if (dead := self._watch.dead_rank(PEER_DELAY_S)) is not None:
                    failure = self._lost(*dead, method)
            self._end(failure, error)
        except ray.exceptions.RayError as error:
            check_cluster(ERROR_DELAY_S)
            self._end(self._lost(rank, f"died: {why_it_died(error)}", method), error)

    def _end_if_lost(self, working: Collection[int], method: str) -> None:
        check_cluster()
        if (lost := self._watch.look(working)) is not None:
            check_cluster(ERROR_DELAY_S)
            self._end(self._lost(*lost, method))

    def _lost(self, rank: int, what: str, method: str) -> TrainerLostError:
        node = f" on {self._nodes[rank]}" if self._nodes else ""
        return TrainerLostError(f"trainer rank {rank}{node}, in {method}, {what}")

    def _end(self, failure: Exception, cause: BaseException | None = None) -> NoReturn:
        self._failure = failure
        self.end_ranks()
        raise failure from cause


@dataclass(frozen=True)
class Trained:
    """What all ranks answered to `train_iteration`."""

    report: IterationReport
    token_weights: list[TokenWeights]
    costs: list[RankCosts]
    """By rank."""


class RLTrainer(TrainerGroup):
    """The ranks of a reinforcement-learning run."""

    def __init__(
        self,
        config: "Config",
        gpus_per_rank: int,
        gpu_share: float,
        check: Callable[[], None],
        judge: Callable[[list[Accelerators]], None] | None = None,
    ) -> None:
        super().__init__(
            rl_worker,
            config.parallel.world_size,
            gpus_per_rank,
            gpu_share,
            config.recovery,
            check,
            config.placement_timeout_s,
            judge,
            config=config,
        )

    def peak_flops(self) -> float | None:
        """Dense BF16 FLOP/s of all ranks' GPUs together; None if one is not known, or without GPUs."""
        peaks = self.call(RLRank.peak_flops)
        known = [peak for peak in peaks if peak is not None]
        return sum(known) if len(known) == len(peaks) else None

    def store(self, batch: "IterationBatch") -> "list[ray.ObjectRef[RankShare]]":
        """Write the share of each data-parallel rank to Ray's object store."""
        return [ray.put(batch.share(rank)) for rank in range(batch.data_parallel_size)]

    def train_iteration(
        self,
        shares: "list[ray.ObjectRef[RankShare]]",
        lr: float,
        samples: list[int],
        meanwhile: Callable[[], None] | None = None,
    ) -> Trained:
        """Old log-probs and one optimizer step per mini-batch, on all ranks. See `RLRank.train_iteration`.

        `shares` as returned by `store`. `meanwhile` is called repeatedly until all ranks are done.
        """
        answers = self.call_while(meanwhile, RLRank.train_iteration, shares, lr, samples)
        return Trained(
            report=next(answer.report for answer in answers if answer.report is not None),
            token_weights=[weights for answer in answers for weights in answer.token_weights],
            costs=[answer.costs for answer in answers],
        )

    def push_weights(self, engines: Mapping[int, Any], version: int, check: bool) -> PushFailure | None:
        """Send the weights to these engines as `version`. Returns the engine that failed, if one did."""
        answers = self.call(RLRank.push_weights, engines, version, check)
        return next((failure for failure in answers if failure is not None), None)

    def start_save(self, folder: Path) -> None:
        """Begin to write a checkpoint's weights, optimizer and random states."""
        self.call(RLRank.start_save, str(folder))

    def save_finished(self, blocking: bool) -> bool:
        """Whether all ranks have written it."""
        return all(self.call(RLRank.save_finished, blocking))

    def hash_files(self, folder: Path) -> dict[str, "FileRecord"]:
        """Size and checksum of each file that the ranks wrote into a checkpoint; each hashes its own."""
        answers = self.call(RLRank.hash_files, str(folder))
        return {name: record for part in answers for name, record in part.items()}

    def check_files(self, folder: Path) -> list[str]:
        """Damage found in the files of a checkpoint's manifest, a sentence each, checked by all ranks."""
        return [problem for part in self.call(RLRank.check_files, str(folder)) for problem in part]

    def load(self, folder: Path) -> bool:
        """Resume from a checkpoint. False if another parallel layout wrote it."""
        return all(self.call(RLRank.load, str(folder)))


class SftTrainer(TrainerGroup):
    """The ranks of supervised training."""

    def __init__(self, settings: RankSettings, gpus_per_rank: int) -> None:
        super().__init__(sft_worker, settings.parallel.world_size, gpus_per_rank, settings=settings)

    def train_steps(
        self, batches: "list[list[list[list[Trajectory]]]]", rates: list[float], pad_token_id: int
    ) -> list[float]:
        """One optimizer step per batch, on all ranks; their losses. See `SftRank.train_steps`."""
        answers = self.call(SftRank.train_steps, put_once(batches), rates, pad_token_id)
        return next(losses for losses in answers if losses is not None)

    def supervised_loss(self, batch: "list[list[list[Trajectory]]]", pad_token_id: int) -> float:
        """Mean cross-entropy per response token of a batch, without an update."""
        answers = self.call(SftRank.supervised_loss, put_once(batch), pad_token_id)
        return next(loss for loss in answers if loss is not None)


def put_once(value: Value) -> Value:
    """Store a large argument once for all ranks: a reference, which Ray replaces by the value on the rank."""
    return cast(Value, ray.put(value))


def rl_worker() -> type[RLRank]:
    """The worker class. Imports Megatron-Core: call it on the rank."""
    from megatron_fipo.trainer.rl_worker import RLWorker

    return RLWorker


def sft_worker() -> type[SftRank]:
    """The worker class. Imports Megatron-Core: call it on the rank."""
    from megatron_fipo.trainer.sft_worker import SftWorker

    return SftWorker
