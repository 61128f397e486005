"""Dynamic sampling as a stream: prompts go to the engines, groups are judged as they finish, those that teach something wait for use.

Every prompt gets a serial number, in the order of the dataset; the seeds of its responses come from that number and not from timing.
`rollout.unfinished` decides between two kinds of admission:

- `drop` uses exactly the smallest prefix of the dataset's order with `target_groups` informative groups, whatever the timing. It starts
  `prompts_in_flight` prompts at once and then one only while waiting and unfinished groups together are fewer than needed. What was
  started beyond the prefix is dropped; with no more `prompts_in_flight` than `target_groups` there is no such thing.
- `continue` keeps `prompts_in_flight` prompts at the engines. Which groups finish first is a matter of timing; what has not finished
  goes on under the next weights, and what finished too much waits, both for `max_staleness` versions.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from megatron_fipo.config import RolloutConfig
from megatron_fipo.driver.rollout.prompt_group import Group, PromptGroup, Response, parse_request_id
from megatron_fipo.engine.protocol import RAY_LOGS, GenerationRequest, SamplingParams
from megatron_fipo.errors import UserError
from megatron_fipo.objective.advantages import is_informative
from megatron_fipo.tasks.dataset import Dataset

if TYPE_CHECKING:
    from megatron_fipo.driver.rollout.pool import Settled


class Pool(Protocol):
    """What the collector needs of `pool.EnginePool`."""

    def submit(self, requests: Sequence[GenerationRequest], sampling: SamplingParams) -> None: ...

    def poll(self, timeout_s: float) -> "list[Settled]": ...

    def abort(self) -> "list[Settled]": ...


@dataclass
class CollectCounts:
    """What became of prompts and response tokens since the last `take`.

    `generated_tokens` and what was carried before = `used_tokens` + `filtered_tokens` + `dropped_tokens` + `carried_tokens`.
    """

    prompts: int = 0
    """Prompts started."""
    informative: int = 0
    """Finished groups whose responses differ in accuracy."""
    all_right: int = 0
    all_wrong: int = 0
    failed: int = 0
    """Groups dropped because a response failed more often than `max_retries` allows; never scored."""
    stale: int = 0
    """Groups dropped, finished or not, because the next update would come more than `max_staleness` versions after their oldest token."""
    from_earlier: int = 0
    """Groups used now whose prompt was started before the last `take`."""
    waiting: int = 0
    """Informative groups left for later."""
    unfinished: int = 0
    """Groups in work after this `take`."""
    generated_tokens: int = 0
    """Response tokens that came from the engines."""
    used_tokens: int = 0
    filtered_tokens: int = 0
    """Of groups all right or all wrong."""
    dropped_tokens: int = 0
    """Of stale and failed groups, and with unfinished=drop of what was started but not needed."""
    carried_tokens: int = 0
    """Of waiting and unfinished groups, after this `take`."""
    unused_share: float = 0.0
    """Responses of informative groups that were dropped / all responses of informative groups, since the run began."""

    def leave_out(self, why: str, tokens: int, times: int = 1) -> None:
        """Count a group that is of no use: `why` is `all_right`, `all_wrong` or `failed`. `times` -1 takes it back."""
        setattr(self, why, getattr(self, why) + times)
        if why == "failed":
            self.dropped_tokens += times * tokens
        else:
            self.filtered_tokens += times * tokens


@dataclass
class Collected:
    """What one iteration trains on."""

    groups: list[Group]
    """At most `target_groups`, in the order of their serials; fewer where `max_prompts` were spent."""
    counts: CollectCounts


class Collector:
    """Collects the groups of one iteration after the other.

    Between `resume` and `pause` requests are at the engines, and `step` has to be called often. Between `pause` and `resume` nothing
    is, and `state` may be saved. A request's weights are those of the last `resume`; what `take` returns is to be trained next.

    With unfinished=drop groups count in the order of their serials, not in the order in which they finish: an iteration gets the
    first `target_groups` informative ones, and when `pause` comes, everything behind them is forgotten and the dataset wound back.
    So timing decides how many tokens are wasted and nothing else.
    """

    def __init__(
        self,
        dataset: Dataset,
        pool: Pool,
        score_group: Callable[[PromptGroup], Group],
        rollout: RolloutConfig,
        *,
        target_groups: int,
        responses_per_prompt: int,
        seed: int,
    ) -> None:
        """`score_group` must be pure: groups that wait are saved unscored and scored again by `load_state`."""
        self.counts = CollectCounts()
        self._dataset = dataset
        self._pool = pool
        self._score_group = score_group
        self._rollout = rollout
        self._target = target_groups
        self._responses_per_prompt = responses_per_prompt
        self._seed = seed
        self._sampling = SamplingParams(rollout.temperature, rollout.top_p, rollout.max_response_length)
        self._running = False
        self._unfinished: dict[int, PromptGroup] = {}
        self._waiting: dict[int, tuple[PromptGroup, Group]] = {}
        self._serial = 0
        self._first_serial = 0
        """The first serial started after the last `take`."""
        self._base = 0
        """The first serial behind those of the last `take`: where a collection begins and, with drop, may be wound back to."""
        self._filtered: dict[int, tuple[str, int]] = {}
        """Why each group from `_base` on was left out (a field of `counts`), and its tokens. Only unfinished=drop looks at it."""
        self._update_version = 0
        """The weight version that the next `take` is for: that of the last `resume`, or after a `take` the one behind it."""
        self._informative = 0
        self._informative_dropped = 0

    @property
    def waiting(self) -> int:
        """Informative groups that `take` may return."""
        return len(self._waiting)

    @property
    def unfinished(self) -> int:
        """Groups in work."""
        return len(self._unfinished)

    @property
    def enough(self) -> bool:
        """Whether `take` may be called: the groups wait, or `max_prompts` are spent and nothing more will come."""
        return len(self._ready()) >= self._target or (self._spent and not self._unfinished)

    def resume(self, version: int) -> None:
        """Begin, or go on, under weights `version`: drop what became too old, send the unfinished responses and new prompts."""
        if self._running:
            raise RuntimeError("resume() was called twice without pause()")
        self._update_version = version
        self._drop_stale(version, [group for group, _ in self._waiting.values()])
        # Where the next iteration's groups wait already, what is unfinished is for the one after it at the earliest.
        self._drop_stale(version + self.enough, self._unfinished.values())
        self._running = True
        for group in self._unfinished.values():
            self._submit(group)
        self._refill()

    def step(self, timeout_s: float) -> None:
        """Handle what the engines have settled (waiting up to `timeout_s` for something), and start the prompts there is room for.

        Raises `UserError` where the pool has no engine left.
        """
        self._refill()  # a `take` made room
        self._receive(self._pool.poll(timeout_s))
        self._refill()

    def pause(self) -> None:
        """Take everything back from the engines. Does nothing while paused.

        With unfinished=continue, responses are kept as they are. With drop, the groups that make it `enough` are kept and the
        rest is undone; all is where there is not enough.
        """
        if not self._running:
            return
        self._receive(self._pool.abort())
        self._running = False
        if self._rollout.unfinished == "drop":
            ready = self._ready()
            if len(ready) >= self._target:
                self._wind_back(ready[self._target - 1] + 1)
            elif not self.enough:
                self._wind_back(self._base)

    def take(self) -> Collected:
        """The groups of the next update, oldest serials first.

        Raises `UserError` where `max_prompts` gave not one; the next collection then begins with the prompts behind them.
        """
        if not self.enough:
            raise RuntimeError("take() was called before there were enough groups")
        if not self._waiting:
            counts, self.counts, self._first_serial = self.counts, CollectCounts(), self._serial
            self._begin_at(self._serial)
            raise UserError(_nothing_informative(counts))
        serials = self._ready()[: self._target]
        taken = [self._waiting.pop(serial) for serial in serials]
        counts = self.counts
        counts.used_tokens = sum(group.tokens for group, _ in taken)
        counts.from_earlier = sum(serial < self._first_serial for serial in serials)
        self._update_version += 1
        self._drop_stale(self._update_version, [group for group, _ in self._waiting.values()])
        self.counts, self._first_serial = CollectCounts(), self._serial
        self._begin_at(serials[-1] + 1 if len(serials) == self._target else self._serial)
        if self._rollout.unfinished == "drop":
            self._hand_on(counts)
        counts.waiting, counts.unfinished = self.waiting, self.unfinished
        counts.carried_tokens += sum(group.tokens for group in self._held())
        counts.unused_share = self._informative_dropped / self._informative
        return Collected([trajectories for _, trajectories in taken], counts)

    def state(self) -> dict[str, Any]:
        """Everything needed to go on, JSON-able with every bit kept. Only while paused."""
        if self._running:
            raise RuntimeError("state() needs pause() first")
        return {
            "dataset": self._dataset.state(),
            "serial": self._serial,
            "first_serial": self._first_serial,
            "base": self._base,
            "filtered": {str(serial): list(why) for serial, why in self._filtered.items()},
            "informative": self._informative,
            "informative_dropped": self._informative_dropped,
            "counts": asdict(self.counts),
            "groups": [group.to_json() for group in self._held()],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, with `resume`. Raises `UserError` where it belongs to other data. Only while paused."""
        if self._running:
            raise RuntimeError("load_state() needs pause() first")
        self._dataset.load_state(state["dataset"])
        self._serial, self._first_serial, self._base = state["serial"], state["first_serial"], state["base"]
        self._filtered = {int(serial): (why, tokens) for serial, (why, tokens) in state["filtered"].items()}
        self._informative, self._informative_dropped = state["informative"], state["informative_dropped"]
        self.counts = CollectCounts(**state["counts"])
        problems = {problem.problem_id: problem for problem in self._dataset.problems}
        self._unfinished, self._waiting = {}, {}
        for saved in state["groups"]:
            responses = [Response.from_json(response) for response in saved["responses"]]
            group = PromptGroup(saved["serial"], problems[saved["problem_id"]], responses)
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
        rollout = self._rollout
        if self._spent or self.unfinished >= rollout.prompts_in_flight:
            return False
        if rollout.unfinished == "drop":
            begun = self._serial - self._base
            return begun < rollout.prompts_in_flight or self.waiting + self.unfinished < self._target
        iterations_ahead = rollout.max_staleness if rollout.mode == "fully_asynchronous" else 1
        return self.waiting < self._target * iterations_ahead

    def _submit(self, group: PromptGroup) -> None:
        """One call per group: a pool that keeps batches then makes them independent of timing."""
        self._pool.submit(group.requests(self._seed), self._sampling)

    def _receive(self, settled: "Iterable[Settled]") -> None:
        for item in settled:
            serial, place = parse_request_id(item.request_id)
            group = self._unfinished.get(serial)
            tokens = 0 if item.generation is None else len(item.generation.response_ids)
            self.counts.generated_tokens += tokens
            if group is None:  # it failed by another of its responses
                self.counts.dropped_tokens += tokens
            elif item.generation is None:
                self._leave_out(group, "failed")
            else:
                group.responses[place].add(item.generation)
                if group.finished:
                    self._judge(group)

    def _judge(self, group: PromptGroup) -> None:
        """Score a finished group; it waits where it is informative and not too old, else it goes."""
        del self._unfinished[group.serial]
        trajectories = self._score_group(group)
        if is_informative([trajectory.accuracy for trajectory in trajectories]):
            self.counts.informative += 1
            self._informative += 1
            self._waiting[group.serial] = (group, trajectories)
            self._drop_stale(self._update_version, [group])
            return
        self._leave_out(group, "all_right" if trajectories[0].accuracy > 0 else "all_wrong")

    def _leave_out(self, group: PromptGroup, why: str) -> None:
        """Note that a group is done and of no use; `why` is a field of `counts`."""
        self._unfinished.pop(group.serial, None)
        self._filtered[group.serial] = (why, group.tokens)
        self.counts.leave_out(why, group.tokens)

    def _ready(self) -> list[int]:
        """Serials that `take` may return: of the informative groups that wait, with drop only those with no unfinished one before."""
        serials = sorted(self._waiting)
        if self._rollout.unfinished == "continue" or not self._unfinished:
            return serials
        return serials[: bisect_left(serials, min(self._unfinished))]

    def _wind_back(self, serial: int) -> None:
        """Undo every group from `serial` on: as if its prompt had not been drawn, but for the tokens that it cost."""
        for group in [group for group in self._held() if group.serial >= serial]:
            if group.serial in self._waiting:
                self.counts.informative -= 1
                self._informative_dropped += 1
            self._drop(group)
        for later in [later for later in self._filtered if later >= serial]:
            why, tokens = self._filtered.pop(later)
            self.counts.leave_out(why, tokens, -1)
            self.counts.dropped_tokens += tokens
        if serial < self._serial:
            self._dataset.put_back(self._serial - serial)
            self.counts.prompts -= self._serial - serial
            self._serial = serial
            self._first_serial = min(self._first_serial, serial)

    def _hand_on(self, counts: CollectCounts) -> None:
        """Move what a `take` found beyond its last group from its `counts` to those of the next one, which it belongs to."""
        for other, times in ((counts, -1), (self.counts, 1)):
            other.prompts += times * (self._serial - self._base)
            other.informative += times * self.waiting
            for why, tokens in self._filtered.values():
                other.leave_out(why, tokens, times)
        counts.carried_tokens += sum(tokens for _, tokens in self._filtered.values())

    def _begin_at(self, serial: int) -> None:
        """A collection begins: nothing before `serial` will be wound back."""
        self._base = serial
        self._filtered = {later: why for later, why in self._filtered.items() if later >= serial}

    def _drop_stale(self, version: int, groups: Iterable[PromptGroup]) -> None:
        """Drop those of `groups` that an update of weights `version` may not use."""
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

    def _held(self) -> list[PromptGroup]:
        """Waiting and unfinished groups, by serial."""
        groups = [*(group for group, _ in self._waiting.values()), *self._unfinished.values()]
        return sorted(groups, key=lambda group: group.serial)

    def _new_responses(self) -> list[Response]:
        return [Response() for _ in range(self._responses_per_prompt)]


def _nothing_informative(counts: CollectCounts) -> str:
    judged = counts.all_right + counts.all_wrong
    if not judged and counts.failed:
        return f"the requests of all {counts.failed} prompts failed; see {RAY_LOGS}"
    return (
        f"none of {counts.prompts} prompts got both right and wrong answers ({counts.all_right} all right, {counts.all_wrong} all "
        f"wrong, {counts.failed} failed, {counts.stale} too old), so nothing can be learnt: choose problems nearer to the model's "
        "ability, or raise batch.responses_per_prompt or rollout.max_prompts"
    )
