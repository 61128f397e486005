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

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Protocol

from megatron_fipo.clock import clock
from megatron_fipo.config import RolloutConfig
from megatron_fipo.driver.all_wrong import AllWrongWatch
from megatron_fipo.driver.rollout.admission import admission_for
from megatron_fipo.driver.rollout.collect_counts import CollectCounts, Unused
from megatron_fipo.driver.rollout.prompt_group import PromptGroup, Response, ScoredGroup, parse_request_id
from megatron_fipo.driver.rollout.saved_groups import pack_groups, unpack_groups
from megatron_fipo.engine.protocol import GenerationRequest, SamplingParams
from megatron_fipo.errors import UserError, ray_logs
from megatron_fipo.objective.advantages import is_informative
from megatron_fipo.run_dir.loop_state import RolloutState
from megatron_fipo.tasks.dataset import Dataset

if TYPE_CHECKING:
    from megatron_fipo.driver.rollout.pool import RequestResult


class Pool(Protocol):
    """The part of `pool.EnginePool` that the collector uses."""

    def submit(self, requests: Sequence[GenerationRequest], sampling: SamplingParams) -> None: ...

    def poll(self, timeout_s: float) -> "list[RequestResult]": ...

    def abort(self) -> "list[RequestResult]": ...


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
        dataset: Dataset,
        pool: Pool,
        score_group: Callable[[PromptGroup], ScoredGroup],
        watch: AllWrongWatch,
        rollout: RolloutConfig,
        *,
        target_groups: int,
        responses_per_prompt: int,
        seed: int,
    ) -> None:
        """`score_group` must be pure: `load_state` scores waiting groups again, which are saved unscored."""
        self.counts = CollectCounts()
        self.received_tokens = 0
        """Response tokens from the engines, for whoever takes them. `counts` are of a batch, which may be sampled earlier."""
        self.seconds: dict[str, float] = {}
        """Wall time of `scoring`, for whoever takes it."""
        self._dataset = dataset
        self._pool = pool
        self._score_group = score_group
        self._watch = watch
        self._rollout = rollout
        self._admission = admission_for(rollout, target_groups)
        self._target = target_groups
        self._responses_per_prompt = responses_per_prompt
        self._seed = seed
        self._sampling = SamplingParams(rollout.temperature, rollout.top_p, rollout.max_response_length)
        self._running = False
        self._unfinished: dict[int, PromptGroup] = {}
        self._waiting: dict[int, tuple[PromptGroup, ScoredGroup]] = {}
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
        """Groups that are being sampled."""
        return len(self._unfinished)

    @property
    def enough(self) -> bool:
        """Whether `pop_batch` may be called: its groups wait, or `max_prompts` prompts have all finished."""
        return len(self._ready()) >= self._target or (self._spent and not self._unfinished)

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
        """Process the engines' results (wait up to `timeout_s` for one) and start the admitted prompts.

        Raises `UserError` if the pool has no engine left.
        """
        self._refill()  # a `pop_batch` may have admitted more
        self._receive(self._pool.poll(timeout_s))
        self._refill()

    def pause(self) -> None:
        """Take all requests back from the engines. Does nothing while paused.

        With unfinished=continue, responses are kept as they are. With drop, the groups of the next batch are
        kept if there are `enough`, and everything else is undone.
        """
        if not self._running:
            return
        self._receive(self._pool.abort())
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
            raise UserError(self._nothing_informative(counts))
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
        counts.carried_tokens = sum(group.tokens for group in self._carried())
        counts.carried_tokens += self.counts.filtered_tokens + self.counts.dropped_tokens
        counts.unused_share = self._informative_dropped / self._informative
        return Collected([trajectories for _, trajectories in batch], counts)

    def state(self) -> RolloutState:
        """Everything needed to resume, bit for bit. Only while paused."""
        if self._running:
            raise RuntimeError("state() needs pause() first")
        groups, tokens = pack_groups(self._carried())
        values = {
            "dataset": self._dataset.state(),
            "serial": self._serial,
            "first_serial": self._first_serial,
            "base": self._base,
            "filtered": {str(serial): list(why) for serial, why in self._filtered.items()},
            "informative": self._informative,
            "informative_dropped": self._informative_dropped,
            "counts": asdict(self.counts),
            "groups": groups,
        }
        return RolloutState(values, tokens)

    def load_state(self, saved: RolloutState) -> None:
        """Restore a `state`; call `resume` next.

        Raises `UserError` if it belongs to other data. Only while paused.
        """
        if self._running:
            raise RuntimeError("load_state() needs pause() first")
        state = saved.values
        self._dataset.load_state(state["dataset"])
        self._serial, self._first_serial, self._base = state["serial"], state["first_serial"], state["base"]
        self._filtered = {int(serial): (why, tokens) for serial, (why, tokens) in state["filtered"].items()}
        self._informative, self._informative_dropped = state["informative"], state["informative_dropped"]
        self.counts = CollectCounts(**state["counts"])
        problems = {problem.problem_id: problem for problem in self._dataset.problems}
        self._unfinished, self._waiting = {}, {}
        for group in unpack_groups(state["groups"], saved.tokens, problems):
            if group.finished:
                self._waiting[group.serial] = (group, self._score_group(group))
            else:
                self._unfinished[group.serial] = group

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
        self._pool.submit(group.requests(self._seed), self._sampling)

    def _receive(self, results: "Iterable[RequestResult]") -> None:
        for result in results:
            serial, index = parse_request_id(result.request_id)
            group = self._unfinished.get(serial)
            tokens = 0 if result.generation is None else len(result.generation.response_ids)
            self.counts.generated_tokens += tokens
            self.received_tokens += tokens
            if group is None:  # another of its responses failed
                self.counts.dropped_tokens += tokens
            elif result.generation is None:
                self._filter_out(group, "failed")
            else:
                group.responses[index].add(result.generation)
                if group.finished:
                    self._classify(group)

    def _classify(self, group: PromptGroup) -> None:
        """Score a finished group. It is buffered if it is informative and not stale, else dropped."""
        del self._unfinished[group.serial]
        with clock(self.seconds, "scoring"):
            trajectories = self._score_group(group)
        self._watch.finished(group.problem, trajectories)
        if is_informative([trajectory.accuracy for trajectory in trajectories]):
            self.counts.informative += 1
            self._informative += 1
            self._waiting[group.serial] = (group, trajectories)
            self._drop_stale(self._update_version, [group])
            return
        self._filter_out(group, "all_right" if trajectories[0].accuracy > 0 else "all_wrong")

    def _filter_out(self, group: PromptGroup, why: Unused) -> None:
        """Record that a group is finished and not used."""
        self._unfinished.pop(group.serial, None)
        self._filtered[group.serial] = (why, group.tokens)
        self.counts.count_dropped(why, group.tokens)

    def _ready(self) -> list[int]:
        """Serials that the next batch may contain, in order."""
        return self._admission.ready(self._waiting.keys(), self._unfinished.keys())

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
        for group in self._carried():
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

    def _carried(self) -> list[PromptGroup]:
        """Waiting and unfinished groups, by serial."""
        groups = [*(group for group, _ in self._waiting.values()), *self._unfinished.values()]
        return sorted(groups, key=lambda group: group.serial)

    def _nothing_informative(self, counts: CollectCounts) -> str:
        filtered = counts.all_right + counts.all_wrong
        if not filtered and counts.failed:
            return f"the requests of all {counts.failed} prompts failed; see {ray_logs()}"
        found = (
            f"none of {counts.prompts} prompts got both right and wrong answers ({counts.all_right} all right, "
            f"{counts.all_wrong} all wrong, {counts.failed} failed, {counts.stale} too old), so there is nothing "
            "to train on"
        )
        fix = (
            "choose problems closer to the model's ability, or raise batch.responses_per_prompt or "
            "rollout.max_prompts"
        )
        if counts.all_wrong and not counts.all_right and self._watch.example is not None:
            return f"{found}; {self._watch.example}. Otherwise {fix}"
        return f"{found}: {fix}"

    def _new_responses(self) -> list[Response]:
        return [Response() for _ in range(self._responses_per_prompt)]
