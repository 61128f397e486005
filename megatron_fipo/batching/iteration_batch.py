"""The training data of one iteration and its division into micro-batches.

Made once by the driver and used twice by every rank. The pass that records old log-probs and the updates use
the same packing. The first mini-step therefore repeats the old pass operation by operation: its log-ratios
are exactly zero, and any other value indicates a bug.

    groups  →  IterationBatch (driver)  →  RankShare per data-parallel rank  →  shard of each micro-batch (rank)
               all trajectories            what that rank trains on             its context-parallel part
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_fipo.batching.packing import Packing, micro_batch_multiple, plan_micro_batches
from megatron_fipo.batching.rank_share import RankShare
from megatron_fipo.batching.trajectory import Trajectory
from megatron_fipo.config import Config


@dataclass(frozen=True)
class IterationBatch:
    """All trajectories of an iteration, and which rank trains on which of them in which mini-step."""

    trajectories: list[Trajectory]
    mini_batches: list[Packing]
    """By mini-step. `mini_batches[step][data-parallel rank][micro-batch]` lists indices into
    `trajectories`."""
    pad_token_id: int

    @property
    def data_parallel_size(self) -> int:
        return len(self.mini_batches[0])

    def share(self, data_parallel_rank: int) -> RankShare:
        """The part that the ranks with this data-parallel rank train on, for all context, tensor and pipeline ranks."""
        mini_batches = [packing[data_parallel_rank] for packing in self.mini_batches]
        indices = [index for micro_batches in mini_batches for members in micro_batches for index in members]
        trajectories = {index: self.trajectories[index] for index in indices}
        return RankShare(trajectories, mini_batches, self.pad_token_id)


def plan_iteration(
    groups: Sequence[Sequence[Trajectory]], config: Config, pad_token_id: int
) -> IterationBatch:
    """Divide an iteration into mini-batches of complete groups, and these into balanced micro-batches."""
    parallel = config.parallel
    size = config.batch.mini_batch_prompts
    trajectories: list[Trajectory] = []
    mini_batches: list[Packing] = []
    for start in range(0, len(groups), size):
        members = [trajectory for group in groups[start : start + size] for trajectory in group]
        offset = len(trajectories)
        plan = plan_micro_batches(
            [trajectory.length for trajectory in members],
            data_parallel_size=parallel.data_parallel_size,
            token_budget=config.batch.max_tokens_per_micro_batch * parallel.context_parallel_size,
            length_multiple=parallel.length_multiple,
            pack_multiple=parallel.pack_multiple(config.model.token_multiple),
            count_multiple=micro_batch_multiple(
                parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
            ),
        )
        mini_batches.append([[[offset + i for i in micro] for micro in rank] for rank in plan])
        trajectories.extend(members)
    return IterationBatch(trajectories, mini_batches, pad_token_id)
