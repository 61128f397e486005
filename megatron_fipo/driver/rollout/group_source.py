"""Where an iteration's groups come from: engines that sample while, before or instead of training, or a folder of dumps.

`LiveRollouts` holds the three modes of `rollout.mode`, which differ in when the engines work and when they get new weights:

    synchronous         groups → update → push
    one_step_off        groups of the next iteration during the update, all of them with the weights before it → push
    fully_asynchronous  groups of the next iterations during the update → push at once; responses half done go on with new weights
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from megatron_fipo.config import Config
from megatron_fipo.driver.console import Console
from megatron_fipo.driver.rollout.collector import Collected, Collector
from megatron_fipo.driver.rollout.dump import ReplaySource
from megatron_fipo.driver.rollout.pool import EnginePool, PoolCounts
from megatron_fipo.driver.trainer_group import RLTrainer, TrainerLostError
from megatron_fipo.engine.protocol import Generation, GenerationRequest, SamplingParams
from megatron_fipo.errors import UserError

POLL_S = 0.2
"""Longest time that the loop does not look at signals."""


class Interrupted(Exception):
    """The loop has to stop at a point where nothing is half done: the user asked for it, or the cause says why."""


class StopUnsavedError(UserError):
    """The run has to stop, and its last checkpoint, not what it holds now, is the state to go on from."""


UNSAVED = (TrainerLostError, StopUnsavedError)


class Rollouts(Protocol):
    """What the loop asks for. Between `after_update` and the next `groups` nothing is at the engines: state may be saved then."""

    def groups(self, iteration: int, version: int) -> Collected:
        """The groups of iteration `iteration` (from 1), begun under weights `version`. `Interrupted` leaves a state to save."""

    def during_update(self) -> Callable[[], None] | None:
        """What to call again and again while the trainer works, if anything."""

    def after_update(self) -> None: ...

    def push_weights(self, version: int) -> None:
        """Give the engines the trainer's weights as `version`."""

    def take_counts(self) -> PoolCounts: ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


class LiveRollouts:
    """Groups from engines. The trainer is idle whenever a method is called; what `during_update` returns is for while it works."""

    def __init__(
        self,
        config: Config,
        collector: Collector,
        pool: EnginePool,
        trainer: RLTrainer,
        console: Console,
        check_stop: Callable[[], None],
    ) -> None:
        self.config = config
        self.collector = collector
        self.pool = pool
        self.trainer = trainer
        self.console = console
        self.check_stop = check_stop
        """Raises `Interrupted` where the run is to stop."""
        self._pushes = 0
        self._ahead = config.rollout.mode != "synchronous"
        self._colocated = config.rollout.placement == "colocated"
        self._last_iteration = False
        self._failure: UserError | None = None

    def groups(self, iteration: int, version: int) -> Collected:
        self._last_iteration = iteration >= self.config.iterations
        try:
            self.collector.resume(version)
            self._until_enough(version)
            if not self._ahead or self._last_iteration:
                self.collector.pause()
            if self._colocated:
                self.pool.sleep()
            return self.collector.take()
        except UNSAVED:
            raise
        except (Interrupted, UserError) as error:
            self.collector.pause()
            raise Interrupted from error

    def during_update(self) -> Callable[[], None] | None:
        return self._sample_ahead if self._ahead and not self._last_iteration else None

    def _sample_ahead(self) -> None:
        if self._failure is not None:
            time.sleep(POLL_S)
            return
        try:
            self.collector.step(POLL_S)
        except UserError as error:
            # The update goes on to its end, so that there is a state to save.
            self._failure = error

    def after_update(self) -> None:
        failure, self._failure = self._failure, None
        try:
            if failure is not None:
                raise failure
            if self._colocated:
                self.pool.wake()
            if self._ahead and not self._last_iteration and self.config.rollout.mode == "one_step_off":
                self._until_enough_of_the_old_weights()
        except UNSAVED:
            raise
        except UserError as error:
            raise Interrupted from error
        finally:
            self.collector.pause()

    def push_weights(self, version: int) -> None:
        self.console.phase("weight sync")
        try:
            engines = self._loaded_engines()
            while not self._push(engines, version):
                left = self.pool.loaded(wait=False)
                engines = {
                    number: engine for number, engine in engines.items() if number in left
                } or self._loaded_engines()
        except UNSAVED:
            raise
        except UserError as error:
            raise Interrupted from error
        self._pushes += 1

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: SamplingParams,
        version: int,
    ) -> list[Generation | None]:
        """Answer requests that belong to no iteration (an evaluation); None where a request failed for good."""
        answers: dict[str, Generation | None] = {}
        try:
            self.pool.submit(requests, sampling)
            while self.pool.outstanding:
                answers |= {settled.request_id: settled.generation for settled in self.pool.poll(POLL_S)}
                self._push(self.pool.stale(), version)
                self.check_stop()
        except UNSAVED:
            raise
        except (Interrupted, UserError) as error:
            self.pool.abort()
            raise Interrupted from error
        return [answers[request.request_id] for request in requests]

    def take_counts(self) -> PoolCounts:
        return self.pool.take_counts()

    def state(self) -> dict[str, Any]:
        return self.collector.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.collector.load_state(state)

    def _until_enough(self, version: int) -> None:
        while not self.collector.enough:
            self.collector.step(POLL_S)
            self._push(self.pool.stale(), version)
            self.check_stop()

    def _until_enough_of_the_old_weights(self) -> None:
        """Finish the next iteration's groups. A deterministic run does that even when it is to stop: they belong to the saved state.

        The trainer has moved on, so engines that lost their weights get none now. Where all have, the groups are begun again with the
        new weights; a deterministic run stops instead, as its last checkpoint leads to the right ones.
        """
        self.console.phase("rollout", detail="the next iteration's")
        while not self.collector.enough:
            if not self.pool.loaded(wait=False).keys() - self.pool.stale().keys():
                if self.config.deterministic:
                    raise StopUnsavedError(
                        "no rollout engine holds the weights any more with which the next iteration was being sampled, and "
                        "deterministic=true forbids others; run the same command to go on from the last checkpoint"
                    )
                return
            self.collector.step(POLL_S)
            if not self.config.deterministic:
                self.check_stop()

    def _loaded_engines(self) -> dict[int, Any]:
        """Every living engine, loaded; looks at signals while some are being started."""
        while self.pool.starting:
            self.pool.poll(POLL_S)
            self.check_stop()
        return self.pool.loaded(wait=True)

    def _push(self, engines: dict[int, Any], version: int) -> bool:
        """Send the weights to these engines. False where one did not take them: it is started again and no engine was updated."""
        if not engines:
            return True
        every = self.config.rollout.check_weight_sync
        check = every > 0 and self._pushes % every == 0
        failure = self.trainer.push_weights(engines, version, check)
        if failure is None:
            self.pool.updated(engines, version)
            return True
        self.pool.failed(failure.engine, failure.reason)
        return False


class ReplayRollouts:
    """Groups that an earlier run dumped; there are no engines."""

    def __init__(self, source: ReplaySource) -> None:
        self.source = source

    def groups(self, iteration: int, version: int) -> Collected:
        try:
            return self.source.groups(iteration)
        except UserError as error:
            raise Interrupted from error

    def during_update(self) -> None:
        return None

    def after_update(self) -> None: ...

    def push_weights(self, version: int) -> None: ...

    def take_counts(self) -> PoolCounts:
        return PoolCounts()

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None: ...
