"""One attempt to train to the end: everything of it is made anew, from the last checkpoint, but engines and scorers.

    attempt 1   try the user's rewards, start the ranks, the engines and the scorers ─► Loop: resume, train ─► export
                                                              │ a rank, its node or a writer is lost
    attempt 2   take back all requests, start the ranks again ─► Loop: resume, train ─► export

An attempt resumes from the run's folder exactly as a new process does: data, sampling and loop state, logs and random states
are read from there, and the engines get the checkpoint's weights before their first request.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_fipo.config import Config
from megatron_fipo.driver.all_wrong import AllWrongWatch
from megatron_fipo.driver.cluster import start_engines, start_environments, start_scorers, try_rewards
from megatron_fipo.driver.console import Console
from megatron_fipo.driver.loop import Loop, LoopComponents, check_stop
from megatron_fipo.driver.recovery import Recovery
from megatron_fipo.driver.rollout.collector import Collector
from megatron_fipo.driver.rollout.dump import DumpFolder
from megatron_fipo.driver.rollout.episode_pool import EpisodePool
from megatron_fipo.driver.rollout.group_source import GroupSource, LiveGroups, ReplayGroups
from megatron_fipo.driver.rollout.pool import EnginePool
from megatron_fipo.driver.rollout.prompt_group import RequestPool
from megatron_fipo.driver.rollout.trajectories import Overlong
from megatron_fipo.driver.run_end import MODEL, export_model
from megatron_fipo.driver.scoring.pool import ScorerPool
from megatron_fipo.driver.scoring.rehearsal import Trial
from megatron_fipo.driver.stop import Stop
from megatron_fipo.driver.tracking import Trackers
from megatron_fipo.driver.trainer_group import RLTrainer
from megatron_fipo.environment import Machine
from megatron_fipo.run_dir.run_directory import RunDirectory
from megatron_fipo.tasks.dataset import ProblemOrder
from megatron_fipo.tasks.registry import environments_of, rewards_of
from megatron_fipo.tasks.task import Decode, HeldOut


@dataclass(frozen=True)
class RunParts:
    """What all attempts of a process have in common."""

    config: Config
    directory: RunDirectory
    machine: Machine
    trainer: RLTrainer
    train_set: ProblemOrder
    held_out: HeldOut
    decode: Decode
    pad_token_id: int
    replay: DumpFolder | None
    """Dumps to train on instead of engines."""
    trials: Sequence[Trial]
    """Problems on which rewards are tried before the ranks start."""
    console: Console
    stop: Stop
    recovery: Recovery

    def check(self) -> None:
        """Raises `Interrupted` if the run is to stop, and `TrainerLostError` if an idle rank is lost."""
        check_stop(self.stop)
        self.trainer.check()


Engines = tuple[EnginePool, ScorerPool, AllWrongWatch, EpisodePool | None]
"""What attempts keep. The pool of episodes is None if no problem has an environment."""


class Attempts:
    """Runs attempts one after another. As a context manager it ends engines and scorers."""

    def __init__(self, parts: RunParts) -> None:
        self._parts = parts
        self._stack = contextlib.ExitStack()
        self._engines: Engines | None = None
        self._rollouts: GroupSource | None = None

    def __enter__(self) -> "Attempts":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self) -> None:
        """Start the ranks and train to the last iteration, then export the model.

        Raises `LostError`, after which `run` may be called again, and `Interrupted` as `Loop.run`.
        """
        parts = self._parts
        parts.console.phase("starting")
        again = self._rollouts is not None
        if self._rollouts is not None:
            self._rollouts.abandon()
            parts.directory.remove_leftovers()
        else:
            try_rewards(parts.config, parts.config.model.path, parts.trials, parts.console.note)
        parts.trainer.start()
        if not again:
            for line in parts.trainer.describe():
                parts.console.note(line)
        self._rollouts = self._new_rollouts()
        trackers = Trackers(
            parts.config.tracking,
            parts.directory.path,
            asdict(parts.config),
            parts.directory.path.name,
            log=parts.console.note,
        )
        with contextlib.closing(trackers):
            components = LoopComponents(
                parts.trainer,
                self._rollouts,
                parts.held_out,
                parts.decode,
                parts.pad_token_id,
                parts.console,
                trackers,
                parts.stop,
                parts.recovery,
            )
            Loop(parts.config, parts.directory, components).run()
        export_model(parts.trainer, Path(parts.config.model.path).resolve(), parts.directory.path / MODEL)

    def _new_rollouts(self) -> GroupSource:
        """A source that has sampled nothing yet."""
        parts = self._parts
        if parts.replay is not None:
            return ReplayGroups(parts.replay)
        if self._engines is None:
            self._engines = self._start_engines()
        pool, scorers, watch, episodes = self._engines
        train_set = parts.train_set.fresh()
        collector = make_collector(parts.config, train_set, episodes or pool, scorers, watch)
        return LiveGroups(
            parts.config, collector, pool, scorers, parts.trainer, parts.console, parts.check, episodes
        )

    def _start_engines(self) -> Engines:
        parts, config = self._parts, self._parts.config
        log: Callable[[str], Any] = parts.console.note
        pool = start_engines(config, config.model.path, parts.machine, log, parts.trainer.placement)
        self._stack.callback(pool.shutdown)
        rewards = rewards_of(parts.train_set.problems, *parts.held_out.values())
        scorers = start_scorers(config, config.model.path, rewards, log)
        self._stack.callback(scorers.shutdown)
        environments = environments_of(parts.train_set.problems, *parts.held_out.values())
        episodes = None
        if environments:
            episodes = start_environments(config, config.model.path, environments, pool, log)
            self._stack.callback(episodes.shutdown)
        return pool, scorers, AllWrongWatch(parts.decode, log), episodes


def make_collector(
    config: Config, train_set: ProblemOrder, pool: RequestPool, scorers: ScorerPool, watch: AllWrongWatch
) -> Collector:
    """Dynamic sampling of the training problems, scored by the configured reward."""
    overlong = Overlong(
        config.rollout.max_response_length, config.reward.overlong_buffer, config.reward.overlong_factor
    )
    return Collector(
        train_set,
        pool,
        scorers,
        watch,
        config.rollout,
        overlong,
        target_groups=config.batch.prompts_per_iteration,
        responses_per_prompt=config.batch.responses_per_prompt,
        seed=config.seed,
    )
