"""Train iterations of a run again in this process, with the trainer's own parts, and keep every token's numbers.

    state after iteration i − 1  →  old log-probs of all mini-batches  →  per mini-step: log-probs and entropy, then the update

The dump of iteration i has what it was trained on, in order, so `plan_iteration` gives the same mini-batches and packing.
"""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_fipo.batching.iteration_batch import plan_iteration
from megatron_fipo.batching.shard import PackedShard
from megatron_fipo.batching.trajectory import Trajectory
from megatron_fipo.config import Config
from megatron_fipo.driver.loop import learning_rate
from megatron_fipo.driver.tokenizer import checked_tokenizer, pad_id
from megatron_fipo.errors import UserError
from megatron_fipo.model import parallel
from megatron_fipo.model.gpt import forward_log_probs
from megatron_fipo.model.logprob_head.head import HeadRequest
from megatron_fipo.objective.metrics import over_mini_steps
from megatron_fipo.tasks.response_text import ResponseText
from megatron_fipo.trainer.rank_model import RankModel, packed_sequence_parameters
from megatron_fipo.trainer.rl_worker import RLWorker
from tools.future_kl import countdown
from tools.future_kl.run import FinishedRun, for_one_rank
from tools.future_kl.samplers import (
    BFLOAT16,
    BFLOAT16_LOGITS,
    ENGINE,
    ONE_STEP_OFF,
    BFloat16Trainer,
    transformers_log_probs,
)
from tools.future_kl.tokens import MiniStep, influence

CHECKED = ("policy/loss", "policy/grad_norm", "policy/kl", "policy/entropy", "influence/mean")
"""Metrics of the run that the replay must give again. The last three come from the tokens that are analysed."""
RELATIVE, ABSOLUTE = 1e-3, 1e-6
"""Largest difference of a metric. On the machine of the run, with its layout and versions, they are equal to float32 rounding."""


@contextmanager
def trainer_rank(config: Config) -> Iterator[RLWorker]:
    """A single trainer rank of a run in this process, with the run's starting weights. Its process groups end with the context."""
    worker = RLWorker(0, 1, for_one_rank(config))
    worker.setup(worker.rendezvous())
    try:
        yield worker
    finally:
        parallel.destroy()
        dist.destroy_process_group()


@dataclass(frozen=True)
class Replayed:
    """One iteration."""

    steps: list[MiniStep]
    metrics: dict[str, tuple[float, float]]
    """By name in `CHECKED`: the run's value, the replay's."""


class Replay:
    """Replays iterations of a run, in ascending order."""

    def __init__(self, run: FinishedRun, worker: RLWorker) -> None:
        config = worker.config
        self._run, self._worker, self._config = run, worker, config
        self._bfloat16 = BFloat16Trainer(config, worker.device) if config.model.dtype == "float32" else None
        tokenizer = checked_tokenizer(config.model.path, config.model.trust_remote_code)
        self._decode, self._pad = ResponseText(tokenizer), pad_id(tokenizer)

    def iteration(self, number: int) -> Replayed:
        """Replay iteration `number` (from 1). UserError if a checkpoint is damaged or a metric is not the run's."""
        worker, policy = self._worker, self._worker.policy
        groups = self._run.dumps.groups(number).groups
        batch = plan_iteration(groups, self._config, self._pad)
        share = batch.share(0)
        count = len(share.mini_batches)
        shards = [worker.shards(share.micro_batches(step), self._pad) for step in range(count)]
        members = [
            [trajectory for micro in share.micro_batches(step) for trajectory in micro]
            for step in range(count)
        ]
        samplers = [{ENGINE: grid(part, [shard.rows.rollout_log_probs for shard in part])} for part in shards]
        if number > 1 and self._run.has_weights_before(number - 1):
            self._load(number - 1)
            for found, part in zip(samplers, shards, strict=True):
                found[ONE_STEP_OFF] = grid(part, policy.log_probs(part))
        self._load(number)
        old = [policy.log_probs(part) for part in shards]
        if self._bfloat16 is not None:
            self._bfloat16.take(policy)
            logits = transformers_log_probs(worker, members, "bfloat16")
            for found, part, scored in zip(samplers, shards, logits, strict=True):
                found[BFLOAT16] = grid(part, self._bfloat16.log_probs(part))
                found[BFLOAT16_LOGITS] = padded(scored)
        lr = learning_rate(self._config.optimizer.lr, number - 1, self._config.optimizer.warmup_iterations)
        steps = []
        for step, part in enumerate(shards):
            part = [shard.with_old_log_probs(values) for shard, values in zip(part, old[step], strict=True)]
            now = scores(policy, part)
            result = policy.policy_step(part, self._config.objective, lr)
            metrics = result.statistics | {"policy/grad_norm": result.grad_norm}
            steps.append(self._mini_step(number, step + 1, members[step], part, now, samplers[step], metrics))
        return Replayed(steps, self._checked(number, steps))

    def _load(self, number: int) -> None:
        """The state at the start of an iteration. The first needs nothing but its weights: no other has been replayed before it."""
        checkpoint = self._run.weights_before(number)
        if checkpoint is None:
            self._worker.policy.load_hf(Path(self._config.model.path))
            return
        self._run.directory.refuse_damaged(checkpoint, self._worker.check_files(str(checkpoint)))
        self._worker.load(str(checkpoint))

    def _mini_step(
        self,
        iteration: int,
        number: int,
        members: list[Trajectory],
        shards: list[PackedShard],
        now: list[torch.Tensor],
        samplers: dict[str, np.ndarray],
        metrics: dict[str, float],
    ) -> MiniStep:
        mask = ~np.isnan(grid(shards, [shard.labels for shard in shards]))

        def filled(values: np.ndarray) -> np.ndarray:
            return np.where(mask, values, 0.0)

        return MiniStep(
            iteration=iteration,
            number=number,
            mask=mask,
            lengths=np.array([t.response_length for t in members]),
            log_probs=filled(grid(shards, [values[0] for values in now])),
            old_log_probs=filled(grid(shards, [shard.rows.old_log_probs for shard in shards])),
            entropy=filled(grid(shards, [values[1] for values in now])),
            samplers={name: filled(values) for name, values in samplers.items()},
            advantages=np.array([t.advantage for t in members]),
            accuracies=np.array([t.accuracy for t in members]),
            groups=[f"{iteration}/{t.group_id}" for t in members],
            metrics=metrics,
            outcomes=self._outcomes(members) if self._config.reward.name == "countdown" else {},
        )

    def _outcomes(self, members: list[Trajectory]) -> dict[str, np.ndarray]:
        """Countdown's outcomes, [B, L] each."""
        found = [
            countdown.outcomes(
                self._decode(t.prompt_ids), [self._decode([token]) for token in t.response_ids]
            )
            for t in members
        ]
        return {name: padded([values[name] for values in found]) for name in found[0]}

    def _checked(self, number: int, steps: Sequence[MiniStep]) -> dict[str, tuple[float, float]]:
        found = over_mini_steps([self._reported(step) for step in steps])
        recorded = self._run.metrics[number]
        for name, value in found.items():
            if not abs(value - recorded[name]) <= RELATIVE * abs(recorded[name]) + ABSOLUTE:
                raise UserError(
                    f"the replay of iteration {number} has {name} {value:.6g}, but the run recorded {recorded[name]:.6g}; use the "
                    "machine, versions and settings of the run"
                )
        return {name: (recorded[name], value) for name, value in found.items()}

    def _reported(self, step: MiniStep) -> dict[str, float]:
        """The metrics of `CHECKED`, from the step's tokens where they give them."""
        found = influence(step, step.old_log_probs, self._config.objective)
        from_tokens = {
            "policy/kl": -found.log_ratio[step.mask].mean(),
            "policy/entropy": step.entropy[step.mask].mean(),
            "influence/mean": found.weight[step.mask].mean(),
        }
        return {name: float((step.metrics | from_tokens)[name]) for name in CHECKED}


@torch.no_grad()
def scores(policy: RankModel, shards: Sequence[PackedShard]) -> list[torch.Tensor]:
    """Log-probs and entropy under the current weights, float32 [2, R] per shard. One rank that has the complete model."""
    (chunk,) = policy.chunks
    return [
        forward_log_probs(
            chunk,
            shard.input_ids,
            shard.position_ids,
            packed_sequence_parameters(shard),
            HeadRequest(
                shard.row_index,
                shard.labels,
                policy.vocab_size,
                policy.temperature,
                policy.head,
                entropy_gradient=False,
            ),
        )
        for shard in shards
    ]


def grid(shards: Sequence[PackedShard], values: Sequence[torch.Tensor]) -> np.ndarray:
    """One tensor [R] per shard as float64 [B, L], in the order of the micro-batches; NaN where there is no row."""
    return padded(
        [row for shard, part in zip(shards, values, strict=True) for row in shard.scatter_rows(part.double())]
    )


def padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of several lengths as float64 [rows, longest], NaN after their ends."""
    found = np.full((len(rows), max(map(len, rows))), np.nan)
    for target, row in zip(found, rows, strict=True):
        target[: len(row)] = row
    return found
