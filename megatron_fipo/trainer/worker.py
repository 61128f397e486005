"""The rank of a reinforcement-learning run: old log-probs, optimizer steps, weights out, state in and out."""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_fipo.batching.shard import PackedShard
from megatron_fipo.config import Config
from megatron_fipo.objective import FIPOConfig, PolicyObjective
from megatron_fipo.trainer.iteration import IterationBatch
from megatron_fipo.trainer.rank import MegatronRank, RankSettings


@dataclass(frozen=True)
class IterationReport:
    """What the updates of one iteration showed, reduced over all ranks."""

    mini_steps: list[dict[str, float]]
    """Statistics of each optimizer step, `policy/grad_norm` included."""
    seconds: dict[str, float]
    """Wall time of `old_log_probs` and `update` on this rank."""
    rollout_log_prob_difference: float
    """Mean |trainer - engine| log-probability of the sampled tokens: how far the rollout numerics are from training's."""


@dataclass(frozen=True)
class TokenWeights:
    """Influence weights of some rows of one trajectory, from the rank that holds them."""

    trajectory: int
    positions: list[int]
    """Within the response."""
    weights: list[float]


class TrainerWorker(MegatronRank):
    """One rank of the trainer. `TrainerGroup` makes Ray actors of this class."""

    def __init__(self, rank: int, world_size: int, config: Config) -> None:
        settings = RankSettings(
            config.model,
            config.parallel,
            config.head,
            config.optimizer,
            config.rollout.temperature,
            config.seed,
            config.rollout.timeout_s,
        )
        super().__init__(rank, world_size, settings)
        self.config = config

    def build(self) -> None:
        super().build()
        self.reference = self._snapshot() if self.config.objective.kl_coefficient else None

    def train_iteration(
        self, batch: IterationBatch, lr: float, samples: list[int]
    ) -> tuple[IterationReport | None, list[TokenWeights]]:
        """Record old log-probs, then take one optimizer step per mini-batch.

        `samples` are indices into the batch whose influence weights (of the step that trains them) are wanted for the report.
        The report comes from the first rank of the last pipeline stage, the weights from whichever ranks hold the tokens.
        """
        seconds: dict[str, float] = {}
        steps = [self._shards(batch, step) for step in range(len(batch.mini_batches))]
        with _clock(seconds, "old_log_probs"):
            steps, difference = self._with_old_log_probs(steps)
        objective = policy_objective(self.config)
        mini_steps, token_weights = [], []
        with _clock(seconds, "update"):
            for step, shards in enumerate(steps):
                result = self.policy.policy_step(shards, objective, lr)
                mini_steps.append(
                    {**result.statistics, "policy/grad_norm": result.grad_norm, "policy/skipped_steps": float(result.skipped)}
                )
                token_weights += self._token_weights(batch, step, shards, result.influence_weights, samples)
        if not self.reports:
            return None, token_weights
        return IterationReport(mini_steps, seconds, difference), token_weights

    def push_weights(self, engines: dict[int, Any], version: int) -> tuple[int, str] | None:
        """Send the weights to every engine, in Hugging Face names, and compare checksums (collective; rank 0 sends).

        Returns None, or on rank 0 the number of an engine that did not take them and why; then no engine counts as updated.
        """
        from megatron_fipo.checkpoint.hf_export import iterate_hf_tensors
        from megatron_fipo.rollout.weight_sync import WeightSyncError, push_weights

        rollout = self.config.rollout
        tensors = iterate_hf_tensors(self.policy.modules)
        try:
            push_weights(tensors, engines, version, rollout.weight_bucket_mb * 2**20, rollout.timeout_s)
        except WeightSyncError as error:
            return error.engine, error.reason
        return None

    def save(self, folder: str) -> None:
        """Write weights and optimizer as a distributed checkpoint into an existing empty folder (collective)."""
        from megatron_fipo.checkpoint.distributed import save_checkpoint

        save_checkpoint(self.policy.modules, self.policy.optimizer, Path(folder))

    def load(self, folder: str) -> None:
        """Continue from a distributed checkpoint (collective)."""
        from megatron_fipo.checkpoint.distributed import load_checkpoint

        load_checkpoint(self.policy.modules, self.policy.optimizer, Path(folder))

    def _shards(self, batch: IterationBatch, step: int) -> list[PackedShard]:
        return self.shards(batch.micro_batches(step, parallel_state.get_data_parallel_rank()), batch.pad_token_id)

    def _with_old_log_probs(self, steps: list[list[PackedShard]]) -> tuple[list[list[PackedShard]], float]:
        """The same shards scored by the weights before the first update (and by the reference), and the gap to the engines."""
        scored = [self._score(shards, PackedShard.with_old_log_probs) for shards in steps]
        if self.reference is not None:
            with self._reference_weights():
                scored = [self._score(shards, PackedShard.with_reference_log_probs) for shards in scored]
        difference = torch.zeros(2, device=self.device)
        if self.policy.is_last_stage:
            for shard in (shard for shards in scored for shard in shards):
                gap = (shard.rows.old_log_probs - shard.rollout_log_probs).abs().sum()
                difference += torch.stack((gap, torch.full_like(gap, shard.rollout_log_probs.numel())))
            dist.all_reduce(difference, group=self.policy.statistics_group)
        total, count = difference.tolist()
        return scored, total / max(count, 1.0)

    def _score(self, shards: list[PackedShard], place: Callable[[PackedShard, torch.Tensor], PackedShard]) -> list[PackedShard]:
        """`shards` with log-probs put in by `place`; as they are on pipeline stages that see no log-probs."""
        log_probs = self.policy.log_probs(shards)
        if not self.policy.is_last_stage:
            return shards
        return [place(shard, values) for shard, values in zip(shards, log_probs, strict=True)]

    def _snapshot(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for module in self.policy.modules for parameter in module.parameters()]

    @contextmanager
    def _reference_weights(self) -> Iterator[None]:
        """The initial weights in place of the current ones for a while."""
        assert self.reference is not None
        current = self._snapshot()
        self._place(self.reference)
        try:
            yield
        finally:
            self._place(current)

    def _place(self, weights: list[torch.Tensor]) -> None:
        parameters = [parameter for module in self.policy.modules for parameter in module.parameters()]
        with torch.no_grad():
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.copy_(weight)

    def _token_weights(
        self, batch: IterationBatch, step: int, shards: list[PackedShard], weights: list[torch.Tensor], samples: list[int]
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


def policy_objective(config: Config) -> PolicyObjective:
    """The objective's own immutable settings from the run's configuration."""
    settings = config.objective
    return PolicyObjective(
        name=settings.name,
        settings=FIPOConfig(
            half_life=settings.half_life,
            influence_clip=(settings.influence_clip[0], settings.influence_clip[1]) if settings.influence_clip else None,
            safety_threshold=settings.safety_threshold,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            dual_clip=settings.dual_clip,
            drop_dual_clipped=settings.drop_dual_clipped,
            normalization=settings.normalization,
        ),
        kl_coefficient=settings.kl_coefficient,
        entropy_coefficient=settings.entropy_coefficient,
    )


@contextmanager
def _clock(seconds: dict[str, float], name: str):
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[name] = time.perf_counter() - start
