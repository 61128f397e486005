"""The rank of a reinforcement-learning run: old log-probs, optimizer steps, weight export, checkpoints."""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray
import torch
from megatron.core import parallel_state

from megatron_fipo.batching.packing import MicroBatch
from megatron_fipo.batching.rank_share import RankShare
from megatron_fipo.batching.shard import PackedShard
from megatron_fipo.checkpoint.distributed import CheckpointWriter, load_checkpoint
from megatron_fipo.checkpoint.hf_export import describe_hf_tensors, iterate_hf_tensors
from megatron_fipo.checkpoint.manifest import (
    NODE_CACHE_S,
    FileRecord,
    check_files,
    hash_files,
    read_manifest,
    share_of,
)
from megatron_fipo.checkpoint.rng import load_rng, rng_file, save_rng
from megatron_fipo.clock import clock
from megatron_fipo.config import Config
from megatron_fipo.config.gpu_rules import TORCH_ADAM
from megatron_fipo.errors import UserError
from megatron_fipo.model.mcore import ADAM
from megatron_fipo.trainer.costs import take_costs
from megatron_fipo.trainer.iteration_routing import IterationRouting
from megatron_fipo.trainer.one_ahead import one_ahead
from megatron_fipo.trainer.protocol import (
    IterationReport,
    PushFailure,
    RankIteration,
    RankSettings,
    RLRank,
    TokenWeights,
)
from megatron_fipo.trainer.rank import MegatronRank
from megatron_fipo.trainer.rank_model import StepResult
from megatron_fipo.weight_sync.nccl import NcclTransport
from megatron_fipo.weight_sync.object_store import ObjectStoreTransport
from megatron_fipo.weight_sync.transport import Transport, WeightSyncError, WeightTransport, transport_for

Result = TypeVar("Result")
LogProbs = list[list[torch.Tensor]]
"""[mini-step][micro-batch]: float32 [R]; no micro-batches on pipeline stages without log-probs."""


class RLWorker(MegatronRank, RLRank):
    """One trainer rank. `RLTrainer` calls its methods on all ranks together."""

    def __init__(self, rank: int, world_size: int, config: Config) -> None:
        settings = RankSettings(
            config.model,
            config.parallel,
            config.head,
            config.optimizer,
            config.rollout.temperature,
            config.seed,
            config.deterministic,
            config.rollout.timeout_s,
            config.recovery.stall_timeout_s,
        )
        super().__init__(rank, world_size, settings)
        self.config = config

    def build(self) -> None:
        if self.device.type == "cuda" and ADAM == "torch":
            raise UserError(TORCH_ADAM)
        super().build()
        self.reference = self._snapshot() if self.config.objective.kl_coefficient else None
        self.writer = CheckpointWriter()
        self.transport = self._weight_transport()

    def train_iteration(
        self, shares: "Sequence[ray.ObjectRef[RankShare]]", lr: float, samples: list[int]
    ) -> RankIteration:
        seconds: dict[str, float] = {}
        with clock(seconds, "unpickle"):
            share = ray.get(shares[parallel_state.get_data_parallel_rank()])
        routing = IterationRouting(self.policy, self.config.model.router.replay)
        with clock(seconds, "old_log_probs", self.device):
            old = self._log_probs(share, seconds, routing)
            router = routing.finish_scoring()
            reference: LogProbs | None = None
            if self.reference is not None:
                with self._reference_weights():
                    reference = self._log_probs(share, seconds)

        def update(step: int, shards: list[PackedShard]) -> tuple[StepResult, list[TokenWeights]]:
            shards = _with_log_probs(shards, old[step], None if reference is None else reference[step])
            result = self.policy.policy_step(shards, self.config.objective, lr, routing.replayed(step))
            return result, _token_weights(shards, result.influence_weights, share.mini_batches[step], samples)

        with clock(seconds, "update", self.device):
            steps = self._for_each_mini_step(share, update, seconds)
            # Read after the last step: reading waits for the device.
            mini_steps = [_step_metrics(result) for result, _ in steps]
        token_weights = [weights for _, found in steps for weights in found]
        if self.device.type == "cuda" and self.config.rollout.colocated:
            torch.cuda.empty_cache()  # for the engines that wake now
        head = self.policy.head if self.policy.is_last_stage else None
        costs = take_costs(seconds, self.device, None if head is None else head.logits_memory_mb)
        phases = {name: seconds[name] for name in ("old_log_probs", "update")}
        return RankIteration(
            IterationReport(mini_steps, phases, router) if self.reports else None,
            token_weights,
            costs,
        )

    def push_weights(self, engines: Mapping[int, Any], version: int, check: bool) -> PushFailure | None:
        # A TransferStuckError is not caught: the ranks then hang in a collective and must be ended.
        try:
            self.transport.push(engines, version, timeout_s=self.config.rollout.timeout_s, check=check)
        except WeightSyncError as error:
            return PushFailure(error.engine, error.reason)
        return None

    def _weight_transport(self) -> WeightTransport:
        """The transport to the engines, made on all ranks."""
        modules, rollout = self.policy.modules, self.config.rollout
        bucket_bytes = rollout.weight_bucket_mb * 2**20
        if transport_for(rollout.engine, self.device.type, rollout.colocated) is Transport.OBJECT_STORE:
            return ObjectStoreTransport(lambda: iterate_hf_tensors(modules), bucket_bytes)
        return NcclTransport(
            lambda: iterate_hf_tensors(modules, to_host=False),
            describe_hf_tensors(modules),
            rank=self.rank,
            device=self.device,
            workers_per_engine=rollout.engine_tensor_parallel_size,
            buffer_bytes=bucket_bytes,
        )

    def start_save(self, folder: str) -> None:
        asynchronous = self.config.checkpoint.asynchronous
        self.writer.start(self.policy.modules, self.policy.optimizer, Path(folder) / "weights", asynchronous)
        save_rng(Path(folder), self.rank)

    def save_finished(self, blocking: bool) -> bool:
        return self.writer.finished(blocking)

    def hash_files(self, folder: str) -> dict[str, FileRecord]:
        names = [*(f"weights/{name}" for name in self.writer.files), rng_file(self.rank)]
        return hash_files(Path(folder), names)

    def check_files(self, folder: str) -> list[str]:
        files = share_of(read_manifest(Path(folder)).files, self.rank, self.world_size)
        problems = check_files(Path(folder), files, NODE_CACHE_S)
        return [f"{problem}, as rank {self.rank} sees it" for problem in problems]

    def load(self, folder: str) -> bool:
        load_checkpoint(self.policy.modules, self.policy.optimizer, Path(folder) / "weights")
        return load_rng(Path(folder), self.rank, self.world_size)

    def _for_each_mini_step(
        self,
        share: RankShare,
        use: Callable[[int, list[PackedShard]], Result],
        seconds: dict[str, float],
    ) -> list[Result]:
        """`use` on the shards of each mini-step. Those of the next one are built and uploaded meanwhile.

        Shards take about nine times the memory of the tokens, so they are built again for every pass. The wait for them
        is added to `seconds["shards"]`.
        """
        parts: dict[str, float] = {}

        def timed_use(step: int, shards: list[PackedShard]) -> Result:
            with clock(parts, "use"):
                return use(step, shards)

        with clock(parts, "pass"):
            results = one_ahead(
                lambda step: self.shards(share.micro_batches(step), share.pad_token_id),
                timed_use,
                len(share.mini_batches),
            )
        seconds["shards"] = seconds.get("shards", 0.0) + parts["pass"] - parts["use"]
        return results

    def _log_probs(
        self, share: RankShare, seconds: dict[str, float], routing: IterationRouting | None = None
    ) -> LogProbs:
        """Log-probs of all mini-steps under the current weights, kept on the device."""

        def score(step: int, shards: list[PackedShard]) -> list[torch.Tensor]:
            return self.policy.log_probs(shards) if routing is None else routing.log_probs(step, shards)

        return self._for_each_mini_step(share, score, seconds)

    def _snapshot(self) -> list[torch.Tensor]:
        return [
            parameter.detach().clone() for module in self.policy.modules for parameter in module.parameters()
        ]

    @contextmanager
    def _reference_weights(self) -> Iterator[None]:
        """Use the initial weights instead of the current ones inside the context."""
        assert self.reference is not None
        current = self._snapshot()
        self._load_parameters(self.reference)
        try:
            yield
        finally:
            self._load_parameters(current)

    def _load_parameters(self, weights: list[torch.Tensor]) -> None:
        parameters = [parameter for module in self.policy.modules for parameter in module.parameters()]
        with torch.no_grad():
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.copy_(weight)


def _step_metrics(result: StepResult) -> dict[str, float]:
    return {
        **result.statistics,
        "policy/grad_norm": result.grad_norm,
        "policy/skipped_steps": float(result.skipped),
    }


def _with_log_probs(
    shards: list[PackedShard], old: list[torch.Tensor], reference: list[torch.Tensor] | None
) -> list[PackedShard]:
    """The shards with the log-probs of the policy before the update, and of the reference model if there is one.

    Both lists are empty on pipeline stages without log-probs; there the shards are unchanged.
    """
    if old:
        shards = [shard.with_old_log_probs(values) for shard, values in zip(shards, old, strict=True)]
    if reference:
        shards = [
            shard.with_reference_log_probs(values) for shard, values in zip(shards, reference, strict=True)
        ]
    return shards


def _token_weights(
    shards: list[PackedShard], weights: list[torch.Tensor], indices: list[MicroBatch], samples: list[int]
) -> list[TokenWeights]:
    """Influence weights of the samples among these micro-batches, on one tensor-parallel rank.

    `indices` are those of the micro-batches' trajectories.
    """
    if not weights or parallel_state.get_tensor_model_parallel_rank() != 0:
        return []
    wanted, found = set(samples), []
    for shard, values, members in zip(shards, weights, indices, strict=True):
        if not wanted.intersection(members):
            continue
        for index, per_token in zip(members, shard.scatter_rows(values), strict=True):
            positions = np.flatnonzero(~np.isnan(per_token))
            if index in wanted and len(positions):
                found.append(TokenWeights(index, positions, per_token[positions]))
    return found
