"""The rank of a reinforcement-learning run: old log-probs, optimizer steps, weight export, checkpoints."""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state

from megatron_fipo.batching.iteration_batch import IterationBatch
from megatron_fipo.batching.shard import PackedShard
from megatron_fipo.checkpoint.distributed import CheckpointWriter, load_checkpoint
from megatron_fipo.checkpoint.hf_export import describe_hf_tensors, iterate_hf_tensors
from megatron_fipo.checkpoint.manifest import FileRecord, check_files, hash_files, read_manifest
from megatron_fipo.checkpoint.rng import load_rng, save_rng
from megatron_fipo.clock import clock
from megatron_fipo.config import Config
from megatron_fipo.config.gpu_rules import TORCH_ADAM
from megatron_fipo.errors import UserError
from megatron_fipo.model.mcore import ADAM
from megatron_fipo.trainer.protocol import IterationReport, PushFailure, RankSettings, RLRank, TokenWeights
from megatron_fipo.trainer.rank import MegatronRank
from megatron_fipo.weight_sync.nccl import NcclTransport
from megatron_fipo.weight_sync.object_store import ObjectStoreTransport
from megatron_fipo.weight_sync.transport import Transport, WeightSyncError, WeightTransport, transport_for


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
        self, batch: IterationBatch, lr: float, samples: list[int]
    ) -> tuple[IterationReport | None, list[TokenWeights]]:
        seconds: dict[str, float] = {}
        steps = [self._shards(batch, step) for step in range(len(batch.mini_batches))]
        with clock(seconds, "old_log_probs", self.device):
            steps = self._with_old_log_probs(steps)
        objective = self.config.objective
        mini_steps, token_weights = [], []
        with clock(seconds, "update", self.device):
            for step, shards in enumerate(steps):
                result = self.policy.policy_step(shards, objective, lr)
                mini_steps.append(
                    {
                        **result.statistics,
                        "policy/grad_norm": result.grad_norm,
                        "policy/skipped_steps": float(result.skipped),
                    }
                )
                token_weights += self._token_weights(batch, step, shards, result.influence_weights, samples)
        if self.device.type == "cuda" and self.config.rollout.placement == "colocated":
            torch.cuda.empty_cache()  # for the engines that wake now
        if not self.reports:
            return None, token_weights
        return IterationReport(mini_steps, seconds), token_weights

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
        if transport_for(rollout.engine, self.device.type, rollout.placement) is Transport.OBJECT_STORE:
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
        return hash_files(Path(folder), self.rank, self.world_size)

    def check_files(self, folder: str) -> list[str]:
        return check_files(Path(folder), read_manifest(Path(folder)), self.rank, self.world_size)

    def load(self, folder: str) -> bool:
        load_checkpoint(self.policy.modules, self.policy.optimizer, Path(folder) / "weights")
        return load_rng(Path(folder), self.rank, self.world_size)

    def _shards(self, batch: IterationBatch, step: int) -> list[PackedShard]:
        return self.shards(
            batch.micro_batches(step, parallel_state.get_data_parallel_rank()), batch.pad_token_id
        )

    def _with_old_log_probs(self, steps: list[list[PackedShard]]) -> list[list[PackedShard]]:
        """The same shards with log-probs under the weights before the first update, and under the reference model."""
        scored = [self._score(shards, PackedShard.with_old_log_probs) for shards in steps]
        if self.reference is not None:
            with self._reference_weights():
                scored = [self._score(shards, PackedShard.with_reference_log_probs) for shards in scored]
        return scored

    def _score(
        self, shards: list[PackedShard], store: Callable[[PackedShard, torch.Tensor], PackedShard]
    ) -> list[PackedShard]:
        """`shards` with log-probs stored by `store`; unchanged on pipeline stages without log-probs."""
        log_probs = self.policy.log_probs(shards)
        if not self.policy.is_last_stage:
            return shards
        return [store(shard, values) for shard, values in zip(shards, log_probs, strict=True)]

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

    def _token_weights(
        self,
        batch: IterationBatch,
        step: int,
        shards: list[PackedShard],
        weights: list[torch.Tensor],
        samples: list[int],
    ) -> list[TokenWeights]:
        if not weights or parallel_state.get_tensor_model_parallel_rank() != 0:
            return []
        wanted, found = set(samples), []
        indices = batch.mini_batches[step][parallel_state.get_data_parallel_rank()]
        for shard, values, members in zip(shards, weights, indices, strict=True):
            if not wanted.intersection(members):
                continue
            for index, per_token in zip(members, shard.scatter_rows(values), strict=True):
                positions = np.flatnonzero(~np.isnan(per_token))
                if index in wanted and len(positions):
                    found.append(TokenWeights(index, positions.tolist(), per_token[positions].tolist()))
        return found
