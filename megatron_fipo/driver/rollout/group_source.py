"""Where the groups of an iteration come from: engines that sample before or during training, or dumps.

`LiveGroups` implements the three modes of `rollout.mode`, which differ in when the engines sample and when
they get new weights:

    synchronous         groups → update → push
    one_step_off        groups of the next iteration during the update, all with the weights before it → push
    fully_asynchronous  groups of the next iterations during the update → push at once; unfinished responses
                        continue with the new weights
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_fipo.config import Config
from megatron_fipo.driver.console import Console
from megatron_fipo.driver.rank_actor import TrainerRefusedError
from megatron_fipo.driver.rollout.collector import Collected, Collector
from megatron_fipo.driver.rollout.dump import DumpFolder
from megatron_fipo.driver.rollout.engine_usage import RolloutUsage
from megatron_fipo.driver.rollout.episode_pool import EnvironmentCounts, EpisodePool
from megatron_fipo.driver.rollout.losses import PoolCounts
from megatron_fipo.driver.rollout.pool import EnginePool
from megatron_fipo.driver.rollout.prompt_group import GroupRequest, RequestPool, answer_groups
from megatron_fipo.driver.scoring.pool import ScorerCounts, ScorerPool
from megatron_fipo.driver.trainer_group import RLTrainer
from megatron_fipo.engine.protocol import Generation
from megatron_fipo.errors import LostError, UserError
from megatron_fipo.run_dir.loop_state import RolloutState
from megatron_fipo.scorer.protocol import ScoreRequest
from megatron_fipo.tasks.task import Score
from megatron_fipo.weight_sync.transport import Transport, transport_for

POLL_S = 0.2
"""Longest time between two checks for signals, in seconds."""


class Interrupted(Exception):
    """The loop must stop, with a consistent state: the user asked for it, or because of `__cause__`."""


class StopUnsavedError(LostError):
    """The run must stop without saving: its last checkpoint, not its present state, is to be resumed."""


UNSAVED = (LostError, TrainerRefusedError)
"""Errors after which there is no state to save."""


@contextmanager
def interrupting(undo: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Turn a `UserError` into `Interrupted`, so that the state is saved before the run stops.

    Errors of `UNSAVED` pass unchanged. `undo` is called before `Interrupted` is raised or passes.
    """
    try:
        yield
    except UNSAVED:
        raise
    except Interrupted:
        undo()
        raise
    except UserError as error:
        undo()
        raise Interrupted from error


@dataclass(frozen=True)
class RolloutCounts:
    """What happened to engines, scorers and environments since the last call."""

    engines: PoolCounts = field(default_factory=PoolCounts)
    scorers: ScorerCounts = field(default_factory=ScorerCounts)
    environment: EnvironmentCounts | None = None
    """None if no problem has one."""


class GroupSource(Protocol):
    """The loop's view of where groups come from.

    Between `after_update` and the next `groups` no request is at the engines: state may be saved then.
    """

    @property
    def live(self) -> bool:
        """Whether there are engines, which can also `generate`."""

    def groups(self, iteration: int, version: int) -> Collected:
        """The groups of iteration `iteration` (from 1), begun under weights `version`.

        If it raises `Interrupted`, the state can be saved.
        """

    def during_update(self) -> Callable[[], None] | None:
        """A function to call repeatedly while the trainer works, if there is something to do."""

    def after_update(self) -> None:
        """The trainer has finished its update; its weights are not pushed yet."""

    def push_weights(self, version: int) -> None:
        """Send the trainer's weights to the engines as `version`."""

    def generate(self, groups: Sequence[GroupRequest], version: int) -> list[Generation | None]:
        """Answer the requests of an evaluation, in order; None for a request that failed permanently."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[list[Score] | None]:
        """The scores of an evaluation's responses, in order; None for a group that could not be scored."""

    def take_counts(self) -> RolloutCounts:
        """What happened to engines and scorers since the last call."""

    def begin_usage(self) -> None:
        """The first iteration begins: what engines and scorers did before is not part of its usage."""

    def take_usage(self) -> RolloutUsage:
        """What engines and scoring took since the last call, or since `begin_usage`."""

    def state(self) -> RolloutState:
        """What `load_state` needs to resume; empty without engines."""

    def load_state(self, state: RolloutState) -> None: ...

    def abandon(self) -> None:
        """The trainer was lost: take back all requests. The next source of groups begins with idle engines and scorers."""


class LiveGroups:
    """Groups from engines.

    The trainer is idle when a method is called; the function of `during_update` runs while it works.
    """

    live = True

    def __init__(
        self,
        config: Config,
        collector: Collector,
        pool: EnginePool,
        scorers: ScorerPool,
        trainer: RLTrainer,
        console: Console,
        check: Callable[[], None],
        episodes: EpisodePool | None = None,
    ) -> None:
        """`episodes`: the pool with the environments in front of it, if problems have any."""
        self.config = config
        self.collector = collector
        self.pool = pool
        self.scorers = scorers
        self.trainer = trainer
        self.console = console
        self.check = check
        """Raises `Interrupted` if the run is to stop, and `TrainerLostError` if a rank is lost."""
        self._episodes = episodes
        self._requests: RequestPool = episodes or pool
        self._pushes = 0
        rollout = config.rollout
        self._through_nccl = transport_for(rollout.engine, "cuda", rollout.colocated) is Transport.NCCL
        self._samples_during_update = config.rollout.mode != "synchronous"
        self._colocated = rollout.colocated
        self._asleep = False
        self._pushing = False
        self._last_iteration = False
        self._failure: UserError | None = None

    def groups(self, iteration: int, version: int) -> Collected:
        self._last_iteration = iteration >= self.config.iterations
        with interrupting(self.collector.pause):
            self.collector.resume(version)
            self._until_enough(version)
            if not self._samples_during_update or self._last_iteration:
                self.collector.pause()
            if self._colocated:
                self.pool.sleep()
                self._asleep = True
            return self.collector.pop_batch()

    def during_update(self) -> Callable[[], None] | None:
        return self._step_during_update if self._samples_during_update and not self._last_iteration else None

    def _step_during_update(self) -> None:
        if self._failure is not None:
            time.sleep(POLL_S)
            return
        try:
            self.collector.step(POLL_S)
        except UserError as error:
            # The update is finished first, so that there is a state to save.
            self._failure = error

    def after_update(self) -> None:
        failure, self._failure = self._failure, None
        try:
            with interrupting():
                if failure is not None:
                    raise failure
                self._wake()
                one_step_off = self.config.rollout.mode == "one_step_off"
                if self._samples_during_update and not self._last_iteration and one_step_off:
                    self._until_enough_under_old_weights()
        finally:
            self.collector.pause()

    def push_weights(self, version: int) -> None:
        self.console.phase("weight sync")
        with interrupting():
            engines = self._loaded_engines()
            while not self._push(engines, version):
                left = self.pool.loaded(wait=False)
                engines = {
                    number: engine for number, engine in engines.items() if number in left
                } or self._loaded_engines()
        self._pushes += 1

    def generate(self, groups: Sequence[GroupRequest], version: int) -> list[Generation | None]:
        def meanwhile() -> None:
            self._push(self.pool.stale(), version)
            self.check()

        with interrupting(self._requests.abort):
            return answer_groups(self._requests, groups, POLL_S, meanwhile)

    def score(self, requests: Sequence[ScoreRequest]) -> list[list[Score] | None]:
        with interrupting():
            return self.scorers.score(requests, self.check)

    def take_counts(self) -> RolloutCounts:
        environment = None if self._episodes is None else self._episodes.take_counts()
        return RolloutCounts(self.pool.take_counts(), self.scorers.take_counts(), environment)

    def begin_usage(self) -> None:
        with interrupting():
            self._loaded_engines()  # probes them: else what they counted since their last probe comes later
        self.take_usage()

    def take_usage(self) -> RolloutUsage:
        tokens, self.collector.received_tokens = self.collector.received_tokens, 0
        return RolloutUsage(self.pool.take_usage(), tokens, self.scorers.take_seconds())

    def state(self) -> RolloutState:
        return self.collector.state()

    def load_state(self, state: RolloutState) -> None:
        self.collector.load_state(state)

    def abandon(self) -> None:
        self.scorers.abandon()
        self._requests.abort()
        self._wake()
        if self._pushing and self._through_nccl:
            # Without a limit NCCL waits for the trainer's rank 0, inside the engines.
            for number in self.pool.loaded(wait=False):
                self.pool.failed(number, "was taking weights from a trainer that is lost")

    def _wake(self) -> None:
        if self._asleep:
            self.pool.wake()
            self._asleep = False

    def _until_enough(self, version: int) -> None:
        while not self.collector.enough:
            self.collector.step(POLL_S)
            self.console.progress(self.collector.progress)
            self._push(self.pool.stale(), version)
            self.check()

    def _until_enough_under_old_weights(self) -> None:
        """Finish the next iteration's groups.

        A deterministic run finishes them even if it is to stop: they belong to the saved state. The trainer's
        weights are new by now, so engines that lost theirs get none here. If all engines lost them, the
        groups are started again with the new weights; a deterministic run stops instead, since resuming from
        its last checkpoint gives the right groups.
        """
        self.console.phase("rollout", detail="the next iteration's")
        while not self.collector.enough:
            if not self.pool.loaded(wait=False).keys() - self.pool.stale().keys():
                if self.config.deterministic:
                    raise StopUnsavedError(
                        "no rollout engine has the weights any more with which the next iteration was being "
                        "sampled, and deterministic=true forbids others; run the same command to resume "
                        "from the last checkpoint"
                    )
                return
            self.collector.step(POLL_S)
            self.console.progress(self.collector.progress)
            if not self.config.deterministic:
                self.check()

    def _loaded_engines(self) -> dict[int, Any]:
        """Every living engine, loaded; checks for signals while some are starting."""
        while self.pool.starting:
            self.pool.poll(POLL_S)
            self.check()
        return self.pool.loaded(wait=True)

    def _push(self, engines: dict[int, Any], version: int) -> bool:
        """Send the weights to these engines.

        If one fails, it is started again, no engine is updated, and False is returned.
        """
        if not engines:
            return True
        every = self.config.rollout.check_weight_sync
        check = every > 0 and self._pushes % every == 0
        self._pushing = True
        failure = self.trainer.push_weights(engines, version, check)
        self._pushing = False
        if failure is None:
            self.pool.updated(engines, version)
            return True
        self.pool.failed(failure.engine, failure.reason)
        return False


class ReplayGroups:
    """Groups that an earlier run dumped; there are no engines."""

    live = False

    def __init__(self, dumps: DumpFolder) -> None:
        self.dumps = dumps

    def groups(self, iteration: int, version: int) -> Collected:
        with interrupting():
            return self.dumps.groups(iteration)

    def during_update(self) -> None:
        return None

    def after_update(self) -> None: ...

    def push_weights(self, version: int) -> None: ...

    def generate(self, groups: Sequence[GroupRequest], version: int) -> list[Generation | None]:
        raise RuntimeError("a replay has no engines that could generate")

    def score(self, requests: Sequence[ScoreRequest]) -> list[list[Score] | None]:
        raise RuntimeError("a replay has no scorers")

    def take_counts(self) -> RolloutCounts:
        return RolloutCounts()

    def begin_usage(self) -> None: ...

    def take_usage(self) -> RolloutUsage:
        return RolloutUsage([], generated_tokens=0, scoring_s=0.0)

    def state(self) -> RolloutState:
        return RolloutState()

    def load_state(self, state: RolloutState) -> None: ...

    def abandon(self) -> None: ...
