"""What the driver calls on trainer ranks, and the messages that go between them. Imports neither torch nor Megatron-Core.

    driver/trainer_group.py  RLTrainer.train_iteration  →  RLRank.train_iteration  =  rl_worker.py  RLWorker.train_iteration
                             one call, one result           this file                 on every rank, together

Each method but `rendezvous` (rank 0) runs on all ranks at once, because most of them are collective. Arguments and
results are pickled by Ray.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from megatron_fipo.config import HeadConfig, ModelConfig, OptimizerSettings, ParallelConfig
from megatron_fipo.environment import Accelerators

if TYPE_CHECKING:
    import ray

    from megatron_fipo.batching.rank_share import RankShare
    from megatron_fipo.batching.trajectory import Trajectory
    from megatron_fipo.checkpoint.manifest import FileRecord


@dataclass(frozen=True)
class IterationReport:
    """Results of the updates of one iteration, reduced over all ranks."""

    mini_steps: list[dict[str, float]]
    """Metrics of each optimizer step, by the names of `objective/metrics.py`."""
    seconds: dict[str, float]
    """Wall time of `old_log_probs` and `update` on the reporting rank."""
    router: dict[str, float]
    """Metrics of the routers; empty without experts."""


@dataclass(frozen=True)
class RankCosts:
    """What an iteration needed on one rank."""

    unpickle_s: float
    """Seconds in which the rank read its share of the batch from the object store."""
    shards_s: float
    """Seconds in which the rank waited for shards, which are made while it computes."""
    host_bytes: int
    """Largest resident memory of the process since it began."""
    device_bytes: int | None = None
    """Largest memory that tensors occupied on the GPU since the iteration before; None without a GPU."""
    reserved_bytes: int | None = None
    """The same with the allocator's unused blocks."""
    logits_bytes: int | None = None
    """What the head may keep of logits per micro-batch; None without a GPU, without a head, and before it is decided."""


@dataclass(frozen=True, eq=False)
class TokenWeights:
    """Influence weights of some tokens of one trajectory, from the rank that has them."""

    trajectory: int
    """Index into the iteration's trajectories."""
    positions: np.ndarray
    """int64, within the response."""
    weights: np.ndarray
    """float32."""


@dataclass(frozen=True)
class RankIteration:
    """What one rank answers to `train_iteration`."""

    report: IterationReport | None
    """From one rank."""
    token_weights: list[TokenWeights]
    costs: RankCosts


@dataclass(frozen=True)
class PushFailure:
    """A rollout engine that did not take the weights."""

    engine: int
    reason: str


@dataclass(frozen=True)
class RankSettings:
    """The settings needed to build a rank's model and optimizer."""

    model: ModelConfig
    parallel: ParallelConfig
    head: HeadConfig
    optimizer: OptimizerSettings
    temperature: float
    seed: int
    deterministic: bool
    outside_wait_s: float
    """Longest time that a rank may wait for something outside the group while the others are inside a collective."""
    stall_timeout_s: float
    """After this long without progress the driver ends the group."""


class TrainerRank(Protocol):
    """Start of a rank, and what every kind of training needs."""

    def accelerators(self) -> Accelerators:
        """The GPU that this rank sees, and the packages for it."""

    def rendezvous(self) -> str:
        """A free address on this rank's node for the process group."""

    def setup(self, rendezvous: str) -> None:
        """Join the process group, build the model and load the starting weights."""

    def describe(self) -> list[str]:
        """What this rank runs on, a line for each part: layers, attention, FP8, optimizer, kernels."""

    def export_hf(self, source: str, target: str) -> None:
        """Write the weights as a Hugging Face folder, config and tokenizer from `source` (collective; rank 0 writes)."""


class RLRank(TrainerRank, Protocol):
    """A rank of a reinforcement-learning run."""

    def peak_flops(self) -> float | None:
        """Dense BF16 FLOP/s of this rank's GPU; None if not known, or without a GPU."""

    def train_iteration(
        self, shares: "Sequence[ray.ObjectRef[RankShare]]", lr: float, samples: list[int]
    ) -> RankIteration:
        """Compute old log-probs, then take one optimizer step per mini-batch.

        `shares` are stored by data-parallel rank; a rank reads its own. `samples` are indices into the iteration's
        trajectories whose influence weights (of the step that trains them) the report shows. The
        report comes from the first rank of the last pipeline stage, the weights from the ranks that have the tokens.
        """

    def push_weights(self, engines: Mapping[int, Any], version: int, check: bool) -> PushFailure | None:
        """Send the weights to these engines (actor handles by number), in Hugging Face names (collective; rank 0 sends).

        `check` compares checksums. On rank 0 the failure of an engine is returned; then no engine counts as updated.
        """

    def start_save(self, folder: str) -> None:
        """Begin to write weights, optimizer and random states into a checkpoint's folder (collective)."""

    def save_finished(self, blocking: bool) -> bool:
        """Whether everything is on disk (collective). UserError with the writer's reason if it failed, LostError if it was killed."""

    def hash_files(self, folder: str) -> dict[str, "FileRecord"]:
        """Size and checksum of the files that this rank wrote into a checkpoint's folder."""

    def check_files(self, folder: str) -> list[str]:
        """Damage found in this rank's share of the files of a checkpoint's manifest, a sentence each."""

    def load(self, folder: str) -> bool:
        """Resume from a checkpoint (collective). False if the parallel layout differs: random states restart from the seed."""


class SftRank(TrainerRank, Protocol):
    """A rank of supervised training."""

    def train_steps(
        self, batches: "list[list[list[list[Trajectory]]]]", rates: list[float], pad_token_id: int
    ) -> list[float] | None:
        """One optimizer step per batch ([data-parallel rank][micro-batch][trajectory]); losses, from the reporting rank."""

    def supervised_loss(self, batch: "list[list[list[Trajectory]]]", pad_token_id: int) -> float | None:
        """Cross-entropy of the batch's responses without an update (collective), from the reporting rank. Shaped as one batch."""
