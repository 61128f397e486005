"""What one data-parallel rank trains on in an iteration: all that a trainer rank receives of it.

Its context, tensor and pipeline ranks share it. On each node Ray stores it once, and ranks read the token
arrays there, without a copy.
"""

from dataclasses import dataclass

from megatron_fipo.batching.packing import MicroBatch
from megatron_fipo.batching.trajectory import Trajectory


@dataclass(frozen=True)
class RankShare:
    """The trajectories of one data-parallel rank, by mini-step and micro-batch."""

    trajectories: dict[int, Trajectory]
    """By index into the iteration's trajectories."""
    mini_batches: list[list[MicroBatch]]
    """`mini_batches[step][micro-batch]` lists such indices."""
    pad_token_id: int

    def micro_batches(self, step: int) -> list[list[Trajectory]]:
        """The trajectories of each micro-batch of one mini-step."""
        return [[self.trajectories[index] for index in members] for members in self.mini_batches[step]]
