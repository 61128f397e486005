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
from megatron_fipo.errors import UserError
from megatron_fipo.rollout.collector import Collected, Collector
from megatron_fipo.rollout.dump import ReplaySource
from megatron_fipo.rollout.pool import EnginePool, PoolCounts
from megatron_fipo.rollout.protocol import Generation, GenerationRequest, SamplingParams
from megatron_fipo.trainer.console import Console
from megatron_fipo.trainer.group import TrainerGroup

POLL_S = 0.2
"""Longest time that the loop does not look at signals."""


class Interrupted(Exception):
    """The loop has to stop at a point where nothing is half done: the user asked for it, or the cause says why."""


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
        trainer: TrainerGroup,
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
            collected = self.collector.take()
        except (Interrupted, UserError) as error:
            self.collector.pause()
            raise Interrupted from error
        if self._colocated:
            self.pool.sleep()
        return collected

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
        except (Interrupted, UserError) as error:
            raise Interrupted from error
        finally:
            self.collector.pause()

    def push_weights(self, version: int) -> None:
        self.console.phase("weight sync")
        try:
            self._push(self.pool.loaded(wait=True), version)
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
        """The trainer has moved on, so engines that lost theirs get none now. Where all have, the rest is sampled with the new ones."""
        self.console.phase("rollout", detail="the next iteration's")
        while not self.collector.enough and self.pool.loaded(wait=False).keys() - self.pool.stale().keys():
            self.collector.step(POLL_S)
            if not self.config.deterministic:
                self.check_stop()

    def _push(self, engines: dict[int, Any], version: int) -> None:
        """Send the weights; an engine that does not take them is started again, and the others are given them anew."""
        every = self.config.rollout.check_weight_sync
        check = every > 0 and self._pushes % every == 0
        while engines:
            failures = self.trainer.call("push_weights", engines, version, check)
            failure = next((failure for failure in failures if failure is not None), None)
            if failure is None:
                self.pool.updated(engines, version)
                return
            self.pool.failed(*failure)
            engines = {number: engine for number, engine in engines.items() if number != failure[0]} or self.pool.loaded(
                wait=True
            )


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
