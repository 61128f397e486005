"""Dynamic sampling as a stream: groups are filtered as they complete; informative ones are buffered.

Every prompt gets a serial number in the order of the dataset; the seeds of its responses depend on that
number and not on timing. `rollout.unfinished` selects the admission rule (`admission.py`):

- `drop` uses exactly the smallest prefix of the dataset's order with `target_groups` informative groups,
  independent of timing. It starts `prompts_in_flight` prompts at once, and then one only while waiting and
  unfinished groups together are fewer than needed. Groups started after the prefix are dropped; if
  `prompts_in_flight` is at most `target_groups` there are none.
- `continue` keeps `prompts_in_flight` prompts at the engines. Which groups finish first depends on timing.
  Unfinished responses continue under the next weights, and surplus groups are buffered, both for
  `max_staleness` versions.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from megatron_fipo.config import RolloutConfig
from megatron_fipo.driver.all_wrong import AllWrongWatch
from megatron_fipo.driver.rollout.admission import admission_for
from megatron_fipo.driver.rollout.collect_counts import CollectCounts, Unused, nothing_informative
from megatron_fipo.driver.rollout.collector_state import CollectorState
from megatron_fipo.driver.rollout.prompt_group import (
    PromptGroup,
    RequestPool,
    RequestResult,
    Response,
    parse_request_id,
)
from megatron_fipo.driver.rollout.saved_groups import SavedGroup
from megatron_fipo.driver.rollout.trajectories import Overlong, ScoredGroup, trajectories
from megatron_fipo.engine.protocol import SamplingParams
from megatron_fipo.errors import UserError
from megatron_fipo.objective.advantages import is_informative
from megatron_fipo.run_dir.loop_state import RolloutState
from megatron_fipo.scorer.protocol import ScoreRequest
from megatron_fipo.tasks.dataset import ProblemOrder
from megatron_fipo.tasks.task import Score

if TYPE_CHECKING:
    from megatron_fipo.driver.scoring.pool import ScoreResult

SCORES_WAIT_S = 0.02
"""Longest wait for scores, during which results of engines are not taken. A fast reward takes a few milliseconds per group."""


class Scorers(Protocol):
    """The part of `scoring.pool.ScorerPool` that the collector uses."""

    def submit(self, request: ScoreRequest) -> None: ...

    def poll(self, timeout_s: float) -> "list[ScoreResult]": ...

    def finish(self) -> "list[ScoreResult]": ...


@dataclass
class Collected:
    """The batch of groups that one iteration trains on."""

    groups: list[ScoredGroup]
    """At most `target_groups`, in the order of their serials; fewer if `max_prompts` were started."""
    counts: CollectCounts


class Collector:
    """Collects one batch of groups after another.

    Between `resume` and `pause` requests are at the engines, and `step` must be called often. Between `pause`
    and `resume` there are none, and `state` may be saved. Requests are sampled by the weights of the last
    `resume`; the batch that `pop_batch` returns must be trained on next.

    With unfinished=drop groups are used in the order of their serials, not in the order in which they finish:
    a batch has the first `target_groups` informative ones, and `pause` discards all later ones and rewinds
    the dataset. So timing affects the number of wasted tokens and nothing else.
    """

    def __init__(
        self,
        dataset: ProblemOrder,
        pool: RequestPool,
        scorers: Scorers,
        watch: AllWrongWatch,
        rollout: RolloutConfig,
        overlong: Overlong,
        *,
        target_groups: int,
        responses_per_prompt: int,
        seed: int,
    ) -> None:
        self.counts = CollectCounts()
        self.received_tokens = 0
        """Response tokens from the engines, for whoever takes them. `counts` are of a batch, which may be sampled earlier."""
        self._dataset = dataset
        self._pool = pool
        self._scorers = scorers
        self._watch = watch
        self._rollout = rollout
        self._overlong = overlong
        self._admission = admission_for(rollout, target_groups)
        self._target = target_groups
        self._responses_per_prompt = responses_per_prompt
        self._seed = seed
        self._running = False
        self._unfinished: dict[int, PromptGroup] = {}
        self._scoring: dict[int, PromptGroup] = {}
        """Finished groups without scores. Like unfinished ones, they may turn out to be informative."""
        self._waiting: dict[int, tuple[PromptGroup, list[Score]]] = {}
        self._serial = 0
        """Of the next prompt."""
        self._first_serial = 0
        """The first serial started after the last `pop_batch`."""
        self._base = 0
        """The first serial after the last batch. With drop, a collection may be rewound to it."""
        self._filtered: dict[int, tuple[Unused, int]] = {}
        """Why each group from `_base` on was not used, and its number of tokens. Read only with
        unfinished=drop."""
        self._update_version = 0
        """The weight version that the next batch updates: that of the last `resume`, plus 1 after a
        `pop_batch`."""
        self._informative = 0
        self._informative_dropped = 0

    @property
    def progress(self) -> str:
        """How far the next batch is, for the user."""
        counts = self.counts
        return (
            f"{self.waiting} of {self._target} groups; {counts.prompts} prompts, of which {counts.all_right} all right, "
            f"{counts.all_wrong} all wrong, {self.unfinished} unfinished"
        )

    @property
    def waiting(self) -> int:
        """Informative groups that are buffered."""
        return len(self._waiting)

    @property
    def unfinished(self) -> int:
        """Groups that are being sampled or scored."""
        return len(self._unfinished) + len(self._scoring)

    @property
    def enough(self) -> bool:
        """Whether `pop_batch` may be called: its groups wait, or `max_prompts` prompts have all finished."""
        return len(self._ready()) >= self._target or (self._spent and not self.unfinished)

    def resume(self, version: int) -> None:
        """Start or resume under weights `version`: drop stale groups, submit unfinished and new ones."""
        if self._running:
            raise RuntimeError("resume() was called twice without pause()")
        self._update_version = version
        self._drop_stale(version, [group for group, _ in self._waiting.values()])
        # If the groups of the next batch are buffered already, unfinished ones are used one batch later at
        # the earliest.
        self._drop_stale(version + self.enough, self._unfinished.values())
        self._running = True
        for group in self._unfinished.values():
            self._submit(group)
        self._refill()

    def step(self, timeout_s: float) -> None:
        """Process results of engines and scorers (wait up to `timeout_s` for one) and start the admitted prompts.

        Raises `UserError` if the pool has no engine left, or if groups cannot be scored (`ScorerPool.poll`).
        """
        self._refill()  # a `pop_batch` may have admitted more
        self._receive(self._pool.poll(0.0 if self._scoring else timeout_s))
        self._take_scores(self._scorers.poll(min(timeout_s, SCORES_WAIT_S) if self._scoring else 0.0))
        self._refill()

    def pause(self) -> None:
        """Take all requests back from the engines and wait for all scores. Does nothing while paused.

        With unfinished=continue, responses are kept as they are. With drop, the groups of the next batch are
        kept if there are `enough`, and everything else is undone.
        """
        if not self._running:
            return
        self._receive(self._pool.abort())
        self._take_scores(self._scorers.finish())
        self._running = False
        if self._admission.in_order:
            self._rewind(self._batch_end() if self.enough else self._base)

    def pop_batch(self) -> Collected:
        """Remove and return the groups of the next update, in the order of their serials.

        Raises `UserError` if `max_prompts` gave none; the next collection then begins with the prompts after
        them.
        """
        if not self.enough:
            raise RuntimeError("pop_batch() was called before there were enough groups")
        if not self._waiting:
            counts, self.counts, self._first_serial = self.counts, CollectCounts(), self._serial
            self._begin_at(self._serial)
            raise UserError(nothing_informative(counts, self._watch.example, self._rollout.filter_by))
        serials, end = self._ready()[: self._target], self._batch_end()
        batch = [self._waiting.pop(serial) for serial in serials]
        counts = self.counts
        counts.used_tokens = sum(group.tokens for group, _ in batch)
        counts.from_earlier = sum(serial < self._first_serial for serial in serials)
        self._update_version += 1
        self._drop_stale(self._update_version, [group for group, _ in self._waiting.values()])
        self._begin_at(end)
        self.counts = self._counts_from(end) if self._admission.in_order else CollectCounts()
        counts -= self.counts
        self._first_serial = self._serial
        counts.waiting, counts.unfinished = self.waiting, self.unfinished
        counts.carried_tokens = sum(group.tokens for group, _ in self._carried())
        counts.carried_tokens += self.counts.filtered_tokens + self.counts.dropped_tokens
        counts.unused_share = self._informative_dropped / self._informative
        return Collected([trajectories(group, scores, self._overlong) for group, scores in batch], counts)

    def state(self) -> RolloutState:
        """Everything needed to resume, bit for bit. Only while paused."""
        if self._running:
            raise RuntimeError("state() needs pause() first")
        return CollectorState(
            dataset=self._dataset.state(),
            serial=self._serial,
            first_serial=self._first_serial,
            base=self._base,
            filtered=self._filtered,
            informative=self._informative,
            informative_dropped=self._informative_dropped,
            counts=self.counts,
            groups=self._carried(),
        ).pack()

    def load_state(self, saved: RolloutState) -> None:
        """Restore a `state`; call `resume` next.

        Groups of older versions, which saved no scores, are scored here. Raises `UserError` if the state
        belongs to other data, and `ValueError` for one that `state` does not give. Only while paused.
        """
        if self._running:
            raise RuntimeError("load_state() needs pause() first")
        # Before the groups: their problems may be missing in other data.
        self._dataset.load_state(saved.values.get("dataset"))
        problems = {problem.problem_id: problem for problem in self._dataset.problems}
        state = CollectorState.unpack(saved, problems)
        self._serial, self._first_serial, self._base = state.serial, state.first_serial, state.base
        self._filtered, self.counts = state.filtered, state.counts
        self._informative, self._informative_dropped = state.informative, state.informative_dropped
        self._unfinished, self._waiting = {}, {}
        for group, scores in state.groups:
            if not group.finished:
                self._unfinished[group.serial] = group
            elif scores is not None:
                self._waiting[group.serial] = (group, scores)
            else:
                self._score(group)
        for result in self._scorers.finish():
            group = self._scoring.pop(result.request.key)
            if result.scores is None:
                self._informative_dropped += 1
                self._filter_out(group, "unscored")
            else:
                self._waiting[group.serial] = (group, result.scores)

    @property
    def _spent(self) -> bool:
        return self.counts.prompts >= self._rollout.max_prompts

    def _refill(self) -> None:
        while self._may_start():
            problem = self._dataset.take(1)[0]
            group = PromptGroup(self._serial, problem, self._new_responses())
            self._unfinished[group.serial] = group
            self._serial += 1
            self.counts.prompts += 1
            self._submit(group)

    def _may_start(self) -> bool:
        if self._spent or self.unfinished >= self._rollout.prompts_in_flight:
            return False
        return self._admission.may_start(self._serial - self._base, self.waiting, self.unfinished)

    def _submit(self, group: PromptGroup) -> None:
        """One call per group: a pool that keeps batches then makes them independent of timing."""
        limit = group.problem.task.max_response_length or self._rollout.max_response_length
        sampling = SamplingParams.of(self._rollout, limit, self._rollout.stop)
        self._pool.submit(group.requests(self._seed), sampling)

    def _receive(self, results: Iterable[RequestResult]) -> None:
        for result in results:
            serial, index = parse_request_id(result.request_id)
            group = self._unfinished.get(serial)
            tokens = result.sampled_tokens
            self.counts.generated_tokens += tokens
            self.received_tokens += tokens
            if group is None:  # another of its responses failed
                self.counts.dropped_tokens += tokens
            elif result.generation is None:
                self._filter_out(group, "unscored" if result.environment_failed else "failed")
            else:
                group.responses[index].add(result.generation)
                if group.finished:
                    del self._unfinished[group.serial]
                    self._score(group)

    def _score(self, group: PromptGroup) -> None:
        self._scoring[group.serial] = group
        self._scorers.submit(group.score_request())

    def _take_scores(self, results: "Iterable[ScoreResult]") -> None:
        for result in results:
            group = self._scoring.pop(result.request.key)
            if result.scores is None:
                self._filter_out(group, "unscored")
            else:
                self._watch.finished(result.request, result.scores)
                self._classify(group, result.scores)

    def _classify(self, group: PromptGroup, scores: list[Score]) -> None:
        """A group is scored. It is buffered if it is informative and not stale, else dropped."""
        by_reward = self._rollout.filter_by == "reward"
        if is_informative([score.reward if by_reward else score.accuracy for score in scores]):
            self.counts.informative += 1
            self._informative += 1
            self._waiting[group.serial] = (group, scores)
            self._drop_stale(self._update_version, [group])
            return
        self._filter_out(group, "all_right" if scores[0].accuracy > 0 else "all_wrong")

    def _filter_out(self, group: PromptGroup, why: Unused) -> None:
        """Record that a group is finished and not used."""
        self._unfinished.pop(group.serial, None)
        self._filtered[group.serial] = (why, group.tokens)
        self.counts.count_dropped(why, group.tokens)

    def _ready(self) -> list[int]:
        """Serials that the next batch may contain, in order."""
        return self._admission.ready(self._waiting.keys(), [*self._unfinished, *self._scoring])

    def _batch_end(self) -> int:
        """The first serial after the next batch; that of the next prompt if the batch is not full."""
        ready = self._ready()
        return ready[self._target - 1] + 1 if len(ready) >= self._target else self._serial

    def _counts_from(self, serial: int) -> CollectCounts:
        """The part of `counts` that the groups from `serial` on contributed, without generated tokens.

        `_base` is at most `serial`.
        """
        waiting = sum(buffered >= serial for buffered in self._waiting)
        counts = CollectCounts(prompts=self._serial - serial, informative=waiting)
        for filtered, (why, tokens) in self._filtered.items():
            if filtered >= serial:
                counts.count_dropped(why, tokens)
        return counts

    def _rewind(self, serial: int) -> None:
        """Undo all groups from `serial` on, as if never started; their tokens count as dropped."""
        undone = self._counts_from(serial)
        self.counts -= undone
        self.counts.dropped_tokens += undone.filtered_tokens + undone.dropped_tokens
        self._informative_dropped += undone.informative
        for group, _ in self._carried():
            if group.serial >= serial:
                self._drop(group)
        self._filtered = {earlier: why for earlier, why in self._filtered.items() if earlier < serial}
        if serial < self._serial:
            self._dataset.put_back(self._serial - serial)
            self._serial = serial
            self._first_serial = min(self._first_serial, serial)

    def _begin_at(self, serial: int) -> None:
        """A collection begins: no group before `serial` will be undone."""
        self._base = serial
        self._filtered = {later: why for later, why in self._filtered.items() if later >= serial}

    def _drop_stale(self, version: int, groups: Iterable[PromptGroup]) -> None:
        """Drop the groups that are too old for an update of weights `version`."""
        for group in list(groups):
            oldest = group.oldest_version
            if oldest is not None and version - oldest > self._rollout.max_staleness:
                self.counts.stale += 1
                self._informative_dropped += group.serial in self._waiting
                self._drop(group)

    def _drop(self, group: PromptGroup) -> None:
        self._waiting.pop(group.serial, None)
        self._unfinished.pop(group.serial, None)
        self.counts.dropped_tokens += group.tokens

    def _carried(self) -> list[SavedGroup]:
        """Waiting groups with their scores, and unfinished ones, by serial."""
        unscored = [*self._unfinished.values(), *self._scoring.values()]
        groups = [*self._waiting.values(), *((group, None) for group in unscored)]
        return sorted(groups, key=lambda saved: saved[0].serial)

    def _new_responses(self) -> list[Response]:
        return [Response() for _ in range(self._responses_per_prompt)]
