"""The training loop of the driver. It holds no tensors: ranks and engines are Ray actors.

    driver (this process)                                  trainer ranks (RLTrainer)      engines (EnginePool)
    ──────────────────────────────────────────────────────────────────────────────────────────────────────────
    rollouts.groups(i, version)
      collector: start prompts  ── requests, prefixes ────────────────────────────────►  generate
      collector: score, filter  ◄─ token ids, log-probs, version ─────────────────────
        (scorers: ScorerPool)
      until prompts_per_iteration informative groups
    set_advantages, plan_iteration
    trainer.train_iteration     ── trajectories, packing ─►  old log-probs
                                                             one optimizer step per mini-batch
                                ◄─ metrics, weights of ───
                                   sample tokens
    rollouts.push_weights       ── "push version i" ──────►  export ── weights ──────►  load, version i
    log, evaluate, save                                      write checkpoint in the background

    mode                 while the trainer updates (rollouts.during_update)    engines get new weights
    synchronous          engines are idle                                      before the next rollout
    one_step_off         groups of iteration i+1 with the weights before i     after the groups are complete
    fully_asynchronous   groups of later iterations, without a stop            at once; unfinished responses continue

The driver waits for ranks in `TrainerGroup`, for engines in `EnginePool` and for scorers in `ScorerPool`; with the
asynchronous modes it polls the collector while it waits for the ranks. Only the driver decides what happens next.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_fipo.batching.iteration_batch import IterationBatch, plan_iteration
from megatron_fipo.clock import clock
from megatron_fipo.config import Config
from megatron_fipo.driver.checkpoint_saver import CheckpointSaver
from megatron_fipo.driver.console import Console
from megatron_fipo.driver.evaluation import evaluate
from megatron_fipo.driver.iteration_metrics import rollout_values, set_values
from megatron_fipo.driver.recovery import Recovery
from megatron_fipo.driver.rollout.collector import Collected
from megatron_fipo.driver.rollout.dump import write_dump
from megatron_fipo.driver.rollout.group_source import GroupSource, Interrupted, interrupting
from megatron_fipo.driver.rollout.trajectories import ScoredGroup
from megatron_fipo.driver.stop import Stop
from megatron_fipo.driver.throughput import Capacity, cost_values, devices_of, work_of
from megatron_fipo.driver.tracking import Trackers
from megatron_fipo.driver.trainer_group import RLTrainer, Trained
from megatron_fipo.errors import UserError
from megatron_fipo.families.flops import model_flops
from megatron_fipo.families.registry import read_model_config
from megatron_fipo.objective.advantages import group_advantages
from megatron_fipo.objective.metrics import over_mini_steps
from megatron_fipo.outputs import write_table
from megatron_fipo.phases import PhaseClock
from megatron_fipo.run_dir import evaluation_table
from megatron_fipo.run_dir.loop_state import LOOP_FILE, TOKENS_FILE, LoopState
from megatron_fipo.run_dir.metrics_log import MetricsLog, Sample, SampleLog, read_metrics
from megatron_fipo.run_dir.run_directory import RunDirectory
from megatron_fipo.tasks.task import Decode, HeldOut
from megatron_fipo.trainer.protocol import TokenWeights


@dataclass
class LoopComponents:
    """What the loop works with; `train.py` assembles it."""

    trainer: RLTrainer
    rollouts: GroupSource
    held_out: HeldOut
    """Empty if nothing is evaluated."""
    decode: Decode
    pad_token_id: int
    console: Console
    trackers: Trackers
    stop: Stop
    recovery: Recovery


class Loop:
    """One run, from its last checkpoint or from the start to `config.iterations`."""

    capacity: Capacity
    """What the work of every iteration is compared with; set when the first one begins."""

    def __init__(self, config: Config, directory: RunDirectory, components: LoopComponents) -> None:
        self.config = config
        self.directory = directory
        self.components = components
        self.metrics = MetricsLog(directory.path)
        self.samples = SampleLog(directory.path)
        self.state = LoopState()
        self.saver = CheckpointSaver(directory, components.trainer)
        self.clock = PhaseClock()
        """An iteration lasts from the end of the one before, evaluation and checkpoint included, to its own end."""
        self.overhead: dict[str, float] = {}
        """Seconds within the phases of the current iteration."""

    def run(self) -> None:
        """Train until `config.iterations`. Raises `Interrupted`, with the state saved, if it must stop before."""
        config, components = self.config, self.components
        self._resume()
        try:
            components.rollouts.push_weights(self.state.weight_version)
            self._evaluate_if_due()
            self._begin_first_iteration()
            while self.state.iteration < config.iterations:
                self._iterate()
                check_stop(components.stop)
                self._evaluate_if_due()
                if self._due(config.checkpoint.every):
                    self._save()
                check_stop(components.stop)
        except Interrupted:
            if self.state.iteration == 0:
                components.console.note("stopped before the first update, so there is nothing to save")
            else:
                self._save()
                self.saver.finish()
                components.console.note(
                    f"stopped after iteration {self.state.iteration}, state saved; run the same command to resume"
                )
            raise
        self.saver.finish()

    def _begin_first_iteration(self) -> None:
        """What came before it (loading, a push, an evaluation) is not part of it."""
        config, components = self.config, self.components
        self.capacity = Capacity(
            devices_of(config, components.rollouts.live),
            model_flops(*read_model_config(config.model.path)),
            forward_passes=2 if config.objective.kl_coefficient else 1,
            peak_flops=components.trainer.peak_flops(),
        )
        components.rollouts.begin_usage()
        self.clock.take()

    def _iterate(self) -> None:
        config, state, components = self.config, self.state, self.components
        components.console.phase("rollout")
        with self.clock.phase("rollout"):
            collected = components.rollouts.groups(state.iteration + 1, state.weight_version)
        with self.clock.phase("plan"):
            set_advantages(collected.groups)
            batch = plan_iteration(collected.groups, config, components.pad_token_id)
            lr = learning_rate(config.optimizer.lr, state.iteration, config.optimizer.warmup_iterations)
            wanted = _samples_to_show(batch) if self._due(config.evaluation.every, later=1) else []
            with clock(self.overhead, "put"):
                stored = components.trainer.store(batch)

        components.console.phase("update", detail=f"{len(batch.mini_batches)} mini-steps")
        during_update = components.rollouts.during_update()
        with self.clock.phase("handover"):
            trained = components.trainer.train_iteration(stored, lr, wanted, during_update)
        self.clock.divide("handover", trained.report.seconds)

        state.iteration += 1
        state.weight_version += 1
        try:
            with self.clock.phase("checkpoint"):
                self.saver.finish_if_written()
            with self.clock.phase("rollout_wait"):
                components.rollouts.after_update()
            check_stop(components.stop)  # before the push, which the resumed run does first
            with self.clock.phase("weight_sync"):
                components.rollouts.push_weights(state.weight_version)
        finally:  # the iteration is complete, whatever happens to the engines
            costs = self._costs(batch, trained, during_update is not None)
            with self.clock.phase("log"):
                self._record(collected, batch, trained, wanted, lr, costs)

    def _costs(
        self, batch: IterationBatch, trained: Trained, sampled_during_update: bool
    ) -> dict[str, float]:
        """What the iteration that ends now cost."""
        overhead, self.overhead = self.overhead, {}
        costs = cost_values(
            self.capacity,
            work_of(batch.trajectories),
            self.clock.take(),
            trained.costs,
            self.components.rollouts.take_usage(),
            sampled_during_update=sampled_during_update,
        )
        return costs | {f"overhead/{name}": seconds for name, seconds in overhead.items()}

    def _record(
        self,
        collected: Collected,
        batch: IterationBatch,
        trained: Trained,
        wanted: list[int],
        lr: float,
        costs: dict[str, float],
    ) -> None:
        """Log a complete iteration. A disk that refuses it stops the run, with the state saved."""
        state, components = self.state, self.components
        values = {
            **rollout_values(collected, batch.trajectories, state.weight_version - 1),
            **set_values(batch.trajectories, self.config.data.sets),
            **{
                f"{processes}/{name}": float(count)
                for processes, counts in asdict(components.rollouts.take_counts()).items()
                for name, count in (counts or {}).items()
            },
            **over_mini_steps(trained.report.mini_steps),
            **trained.report.router,
            "learning_rate": lr,
            "weights/version": float(state.weight_version),
            **components.recovery.values(),
            **costs,
        }
        components.console.iteration(state.iteration, values)
        every = self.config.rollout.dump_every
        try:
            self._log("iteration", values)
            self._log_samples(batch, wanted, trained.token_weights)
            if every and state.iteration % every == 0:
                with clock(self.overhead, "dump"):
                    write_dump(
                        self.directory.path / "rollouts",
                        state.iteration,
                        collected.groups,
                        self.config.rollout.temperature,
                    )
        except UserError as error:
            raise Interrupted from error

    def _evaluate_if_due(self) -> None:
        """Evaluate the current weights if that is due and was not done before the run was last stopped."""
        evaluation, done = self.config.evaluation, self.state.iteration
        due = evaluation.before_training if done == 0 else self._due(evaluation.every)
        if not due or not self.components.held_out:
            return
        records = read_metrics(self.directory.path)
        if not any(record.kind == "evaluation" and record.iteration == done for record in records):
            with interrupting(), self.clock.phase("evaluation"):
                self._evaluate()

    def _evaluate(self) -> None:
        config, components, version = self.config, self.components, self.state.weight_version
        components.console.phase("evaluation")
        start = time.perf_counter()
        evaluation = evaluate(
            lambda groups: components.rollouts.generate(groups, version),
            components.rollouts.score,
            components.held_out,
            components.decode,
            config.evaluation,
            max_new_tokens=config.rollout.max_response_length,
            stop=config.rollout.stop,
            seed=config.seed,
        )
        self._log("evaluation", {**evaluation.values, "evaluation/seconds": time.perf_counter() - start})
        components.console.evaluation(self.state.iteration, evaluation.values)
        if evaluation.all_wrong is not None:
            components.console.note(evaluation.all_wrong)
        write_table(evaluation_table(self.directory.path, self.state.iteration), evaluation.table)

    def _save(self) -> None:
        self.components.console.phase("checkpoint")
        with self.clock.phase("checkpoint"):
            self.state.rollout = self.components.rollouts.state()
            self.saver.save(self.state)
            if not self.config.checkpoint.asynchronous:
                self.saver.finish()

    def _resume(self) -> None:
        checkpoint = self.directory.latest()
        if checkpoint is None:
            self.components.recovery.resumes(read_metrics(self.directory.path), 0)
            self.metrics.truncate_after(-1)
            self.samples.truncate_after(-1)
            return
        self.components.console.phase("checking and loading the checkpoint")
        same_layout = self.saver.load(checkpoint)
        self.state = self.directory.load_state(checkpoint)
        live = self.components.rollouts.live
        if bool(self.state.rollout.values) != live:
            before, now = ("with", "without") if live else ("without", "with")
            raise UserError(
                f"{checkpoint} comes from training {before} --replay and cannot be resumed {now} it: the sampling state differs; "
                "choose another run_dir"
            )
        try:
            self.components.rollouts.load_state(self.state.rollout)
        except ValueError as error:
            fault = f"its {LOOP_FILE} and {TOKENS_FILE} do not give a state of sampling ({error})"
            self.directory.refuse_damaged(checkpoint, [fault])
        self.components.recovery.resumes(read_metrics(self.directory.path), self.state.iteration)
        self.metrics.truncate_after(self.state.iteration)
        self.samples.truncate_after(self.state.iteration)
        again = (
            ""
            if same_layout
            else "; the parallel layout differs, so the ranks' random states restart from the seed"
        )
        self.components.console.note(f"resuming from {checkpoint}{again}")

    def _log(self, kind: Any, values: dict[str, float]) -> None:
        self.metrics.log(kind, self.state.iteration, values)
        self.components.trackers.log(kind, self.state.iteration, values)

    def _log_samples(self, batch: IterationBatch, wanted: list[int], weights: list[TokenWeights]) -> None:
        for index in wanted:
            trajectory = batch.trajectories[index]
            influence = None
            if self.config.objective.name == "fipo":
                influence = np.ones(trajectory.response_length)
                for part in weights:
                    if part.trajectory == index:
                        influence[part.positions] = part.weights
            self.samples.log(
                Sample(
                    iteration=self.state.iteration,
                    prompt=self.components.decode(trajectory.prompt_ids),
                    tokens=[self.components.decode([token]) for token in trajectory.response_ids],
                    influence_weights=None if influence is None else influence.tolist(),
                    reward=trajectory.reward,
                    accuracy=trajectory.accuracy,
                    advantage=trajectory.advantage,
                    finish_reason=trajectory.finish_reason,
                )
            )

    def _due(self, every: int, later: int = 0) -> bool:
        """Whether something done every `every` iterations (0: only after the last) is due now, or `later` iterations later."""
        done = self.state.iteration + later
        return done == self.config.iterations or (every > 0 and done % every == 0)


def check_stop(stop: Stop) -> None:
    """Raises `Interrupted` if a signal or the time limit requested it."""
    if stop.requested():
        raise Interrupted


def set_advantages(groups: Sequence[ScoredGroup]) -> None:
    """Set each response's advantage within its group."""
    trajectories = [trajectory for group in groups for trajectory in group]
    advantages = group_advantages(
        [trajectory.reward for trajectory in trajectories],
        [trajectory.group_id for trajectory in trajectories],
    )
    for trajectory, advantage in zip(trajectories, advantages, strict=True):
        trajectory.advantage = float(advantage)


def learning_rate(lr: float, iteration: int, warmup_iterations: int) -> float:
    """The rate of iteration `iteration` (from 0): linear up to `lr` over the warm-up, constant after it.

    The first iteration already changes the weights. (The authors' scheduler gives it a rate of 0, which wastes it.)
    """
    return lr * min(1.0, (iteration + 1) / max(warmup_iterations, 1))


def _samples_to_show(batch: IterationBatch) -> list[int]:
    """A right and a wrong response of the last mini-batch: its log-probs are the oldest, so its weights differ most from 1."""
    members = sorted(index for rank in batch.mini_batches[-1] for micro in rank for index in micro)
    right = [index for index in members if batch.trajectories[index].accuracy > 0]
    wrong = [index for index in members if batch.trajectories[index].accuracy <= 0]
    return right[:1] + wrong[:1]
