"""The rank of supervised training: optimizer steps on plain cross-entropy."""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

import math

from megatron.core import parallel_state

from megatron_fipo.batching.trajectory import Trajectory
from megatron_fipo.trainer.protocol import SftRank
from megatron_fipo.trainer.rank import MegatronRank


class SftWorker(MegatronRank, SftRank):
    """One rank of supervised training. `SftTrainer` calls its methods on all ranks together."""

    def train_steps(
        self, batches: list[list[list[list[Trajectory]]]], rates: list[float], pad_token_id: int
    ) -> list[float] | None:
        results = []
        for batch, lr in zip(batches, rates, strict=True):
            mine = batch[parallel_state.get_data_parallel_rank()]
            results.append(self.policy.supervised_step(self.shards(mine, pad_token_id), lr))
        losses = [result.statistics.get("loss", math.nan) for result in results]
        return losses if self.reports else None

    def supervised_loss(self, batch: list[list[list[Trajectory]]], pad_token_id: int) -> float | None:
        mine = batch[parallel_state.get_data_parallel_rank()]
        loss = self.policy.supervised_loss(self.shards(mine, pad_token_id))
        return loss if self.reports else None
