"""The training loop: rollout → score → filter → advantages → pack → old log-probs → mini-steps → push weights → evaluate.

It runs in the driver and holds no tensor: ranks and engines are Ray actors behind `TrainerGroup` and `EnginePool`.
"""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from megatron_fipo.config import Config
from megatron_fipo.data.dataset import Dataset
from megatron_fipo.data.problem import Problem
from megatron_fipo.errors import UserError, writing
from megatron_fipo.objective.advantages import group_advantages
from megatron_fipo.reward.score import Scorer
from megatron_fipo.rollout.collector import (
    Collected,
    Group,
    GroupScorer,
    collect_iteration,
    groups_from_json,
    groups_to_json,
)
from megatron_fipo.rollout.pool import EnginePool
from megatron_fipo.trainer.console import Console
from megatron_fipo.trainer.evaluation import evaluate
from megatron_fipo.trainer.group import TrainerGroup
from megatron_fipo.trainer.iteration import IterationBatch, plan_iteration
from megatron_fipo.trainer.iteration_values import over_mini_steps, rollout_values
from megatron_fipo.trainer.metrics_log import MetricsLog, Sample, SampleLog, read_metrics
from megatron_fipo.trainer.state import LoopState, RunDirectory
from megatron_fipo.trainer.tracking import Trackers
from megatron_fipo.trainer.worker import TokenWeights


class Interrupted(Exception):
    """The loop has to stop at a point where nothing is half done: the user asked for it, or the cause says why."""


@dataclass
class Parts:
    """What the loop works with; `run.py` puts it together."""

    trainer: TrainerGroup
    pool: EnginePool
    train_set: Dataset
    held_out: list[Problem]
    scorer: Scorer
    decode: Callable[[Sequence[int]], str]
    pad_token_id: int
    console: Console
    trackers: Trackers


class Loop:
    """One run. `stop_requested` may be set at any time (by a signal handler): the loop then ends with its state saved."""

    def __init__(self, config: Config, directory: RunDirectory, parts: Parts) -> None:
        self.config = config
        self.directory = directory
        self.parts = parts
        self.metrics = MetricsLog(directory.path)
        self.samples = SampleLog(directory.path)
        self.state = LoopState()
        self.surplus: list[Group] = []
        self.stop_requested = False
        self.score_group = GroupScorer(
            parts.scorer,
            parts.decode,
            config.rollout.max_response_length,
            config.reward.overlong_buffer,
            config.reward.overlong_factor,
        )

    def run(self) -> None:
        """Train until `config.iterations`. Raises `Interrupted`, with the state saved, where it has to stop before."""
        config, console = self.config, self.parts.console
        if not self.parts.held_out:
            console.note("there are no held-out problems (data.evaluation_path), so nothing will be evaluated")
        self._resume()
        self._push_weights()
        try:
            self._evaluate_if_due()
            while self.state.iteration < config.iterations:
                self._iterate()
                self._check_stop()
                self._evaluate_if_due()
                if self._due(config.save_every):
                    self._save()
                self._check_stop()
        except Interrupted:
            if self.state.iteration == 0:
                console.note("stopped before the first update, so there is nothing to save")
            else:
                self._save()
                console.note(f"stopped after iteration {self.state.iteration}, state saved; run the same command to go on")
            raise

    def _iterate(self) -> None:
        config, state, parts = self.config, self.state, self.parts
        seconds: dict[str, float] = {}
        start = time.perf_counter()

        with _clock(seconds, "rollout"):
            collected = self._collect()
            self._set_advantages(collected.groups)
        batch = plan_iteration(collected.groups, config, parts.pad_token_id)
        lr = learning_rate(config.optimizer.lr, state.iteration, config.optimizer.warmup_iterations)
        wanted = _samples_to_show(batch) if self._due(config.evaluation.every, ahead=1) else []

        parts.console.phase("update", detail=f"{len(batch.mini_batches)} mini-steps")
        results = parts.trainer.call("train_iteration", ray.put(batch), lr, wanted)
        report = next(report for report, _ in results if report is not None)
        seconds |= report.seconds

        state.iteration += 1
        state.weight_version += 1
        self.surplus = collected.surplus
        with _clock(seconds, "weight_sync"):
            self._push_weights()
        seconds["total"] = time.perf_counter() - start

        values = {
            **rollout_values(collected, batch.trajectories),
            **over_mini_steps(report.mini_steps),
            "rollout/log_prob_difference": report.rollout_log_prob_difference,
            "learning_rate": lr,
            "weights/version": float(state.weight_version),
            **{f"time/{phase}": duration for phase, duration in seconds.items()},
        }
        self._log("iteration", values)
        parts.console.iteration(state.iteration, values)
        self._log_samples(batch, wanted, [weights for _, part in results for weights in part])

    def _collect(self) -> Collected:
        config, parts = self.config, self.parts
        parts.console.phase("rollout")
        before = parts.train_set.state()

        def progress(rounds: int, finished_groups: int) -> None:
            parts.console.phase("rollout", detail=f"round {rounds}, {finished_groups} prompts")
            self._check_stop()

        try:
            return collect_iteration(
                parts.train_set,
                parts.pool,
                self.score_group,
                config.rollout,
                target_groups=config.batch.prompts_per_iteration,
                responses_per_prompt=config.batch.responses_per_prompt,
                surplus=self.surplus,
                version=self.state.weight_version,
                seed=config.seed,
                progress=progress,
            )
        except (Interrupted, UserError) as error:
            # The unfinished rollout will be drawn again: the same problems, the same seeds.
            parts.train_set.load_state(before)
            raise Interrupted from error

    def _set_advantages(self, groups: list[Group]) -> None:
        trajectories = [trajectory for group in groups for trajectory in group]
        advantages = group_advantages(
            [trajectory.reward for trajectory in trajectories], [trajectory.group_id for trajectory in trajectories]
        )
        for trajectory, advantage in zip(trajectories, advantages, strict=True):
            trajectory.advantage = float(advantage)

    def _push_weights(self) -> None:
        """Give all engines the trainer's weights; one that does not take them is retired, and the others are given them again."""
        pool = self.parts.pool
        self.parts.console.phase("weight sync")
        while True:
            try:
                engines = pool.check()
            except UserError as error:
                raise Interrupted from error
            failures = self.parts.trainer.call("push_weights", engines, self.state.weight_version)
            failure = next((failure for failure in failures if failure is not None), None)
            if failure is None:
                return
            pool.retire(*failure)

    def _evaluate_if_due(self) -> None:
        """Evaluate the weights as they are, unless that is not due now or was done before the run was last stopped."""
        evaluation, done = self.config.evaluation, self.state.iteration
        due = evaluation.before_training if done == 0 else self._due(evaluation.every)
        records = read_metrics(self.directory.path)
        if due and self.parts.held_out and not any(r.kind == "evaluation" and r.iteration == done for r in records):
            try:
                self._evaluate()
            except UserError as error:
                raise Interrupted from error

    def _evaluate(self) -> None:
        config, parts = self.config, self.parts
        parts.console.phase("evaluation")
        start = time.perf_counter()
        evaluation = evaluate(
            parts.pool,
            parts.held_out,
            parts.scorer,
            parts.decode,
            config.evaluation,
            max_new_tokens=config.rollout.max_response_length,
            seed=config.seed,
            version=self.state.weight_version,
            on_finished=lambda finished: self._check_stop(),
        )
        self._log("evaluation", {**evaluation.values, "time/evaluation": time.perf_counter() - start})
        parts.console.evaluation(self.state.iteration, evaluation.values)
        write_table(self.directory.path / "evaluations" / f"iteration_{self.state.iteration:06d}.jsonl", evaluation.table)

    def _save(self) -> None:
        self.state.dataset = self.parts.train_set.state()
        self.state.surplus = groups_to_json(self.surplus)
        self.directory.save(self.state, lambda folder: self.parts.trainer.call("save", str(folder)))

    def _resume(self) -> None:
        checkpoint = self.directory.latest()
        if checkpoint is None:
            self.metrics.truncate_after(-1)
            self.samples.truncate_after(-1)
            return
        self.state = self.directory.load_state(checkpoint)
        self.surplus = groups_from_json(self.state.surplus)
        self.parts.train_set.load_state(self.state.dataset)
        self.parts.trainer.call("load", str(checkpoint / "weights"))
        self.metrics.truncate_after(self.state.iteration)
        self.samples.truncate_after(self.state.iteration)
        self.parts.console.note(f"continuing from {checkpoint}")

    def _log(self, kind: Any, values: dict[str, float]) -> None:
        self.metrics.log(kind, self.state.iteration, values)
        self.parts.trackers.log(kind, self.state.iteration, values)

    def _log_samples(self, batch: IterationBatch, wanted: list[int], weights: list[TokenWeights]) -> None:
        for index in wanted:
            trajectory = batch.trajectories[index]
            influence = None
            if self.config.objective.name == "fipo":
                influence = [1.0] * trajectory.response_length
                for part in weights:
                    if part.trajectory == index:
                        for position, weight in zip(part.positions, part.weights, strict=True):
                            influence[position] = weight
            self.samples.log(
                Sample(
                    iteration=self.state.iteration,
                    prompt=self.parts.decode(trajectory.prompt_ids),
                    tokens=[self.parts.decode([token]) for token in trajectory.response_ids],
                    influence_weights=influence,
                    reward=trajectory.reward,
                    accuracy=trajectory.accuracy,
                    advantage=trajectory.advantage,
                    finish_reason=trajectory.finish_reason,
                )
            )

    def _due(self, every: int, ahead: int = 0) -> bool:
        """Whether something done every so many iterations (0: only after the last) comes after this one, or `ahead` later."""
        done = self.state.iteration + ahead
        return done == self.config.iterations or (every > 0 and done % every == 0)

    def _check_stop(self) -> None:
        if self.stop_requested:
            raise Interrupted


def learning_rate(lr: float, iteration: int, warmup_iterations: int) -> float:
    """The rate of iteration `iteration` (from 0): linear up to `lr` over the warm-up, constant after it.

    The first iteration already moves the weights. (The authors' scheduler gives it a rate of 0, a whole iteration for nothing.)
    """
    return lr * min(1.0, (iteration + 1) / max(warmup_iterations, 1))


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object per line."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _samples_to_show(batch: IterationBatch) -> list[int]:
    """A right and a wrong response of the last mini-batch: it trains on the oldest log-probs, so its weights say most."""
    members = sorted(index for rank in batch.mini_batches[-1] for micro in rank for index in micro)
    right = [index for index in members if batch.trajectories[index].accuracy > 0]
    wrong = [index for index in members if batch.trajectories[index].accuracy <= 0]
    return right[:1] + wrong[:1]


@contextmanager
def _clock(seconds: dict[str, float], name: str):
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
