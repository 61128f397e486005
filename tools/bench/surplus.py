"""A simulation of dynamic sampling: tokens wasted and time taken with each setting of `rollout.mode` and `rollout.unfinished`.

    python -m tools.bench.surplus            # some minutes; prints a table for docs/benchmarks.md

The collector is the real one; engines, trainer and clock are simulated, so this measures no hardware:

- Response lengths are log-normal, with one factor per prompt and one per response, cut at 20,480 tokens; counted in blocks of 64.
- A prompt is informative with probability 0.4, independently of its length.
- All engines decode in lockstep; a step takes longer the more responses they run. Prefill, also of resumed responses, costs nothing.
- The trainer takes a fixed time per token and has separate devices. Weight pushes cost nothing.

The reference policy is the authors': rounds of 2,048 prompts, wait for all, train on the first 512 informative groups,
discard the rest.
"""

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_fipo.config import RolloutConfig
from megatron_fipo.driver.all_wrong import AllWrongWatch
from megatron_fipo.driver.iteration_metrics import staleness_values
from megatron_fipo.driver.rollout.collector import Collector
from megatron_fipo.driver.rollout.pool import RequestResult
from megatron_fipo.driver.rollout.prompt_group import PromptGroup, Response, parse_request_id
from megatron_fipo.driver.rollout.trajectories import Overlong, ScoredGroup, trajectories
from megatron_fipo.driver.scoring.pool import ScoreResult
from megatron_fipo.engine.protocol import Generation, GenerationRequest, SamplingParams
from megatron_fipo.scorer.protocol import ScoreRequest
from megatron_fipo.tasks.dataset import Dataset
from megatron_fipo.tasks.task import Problem, Score
from tools.bench.harness import parser, table

BLOCK = 64
MAX_BLOCKS = 20_480 // BLOCK
MEDIAN_LENGTH, PROMPT_SPREAD, RESPONSE_SPREAD = 3_500, 0.6, 0.6
INFORMATIVE = 0.4
TARGET, RESPONSES = 512, 16
ENGINES, SLOTS_PER_ENGINE = 32, 256
STEP_S, STEP_S_PER_RESPONSE = 0.012, 0.00006
"""Time of an engine's decode step, and its increase per response."""
TRAIN_S_PER_TOKEN = 15e-6
NO_PENALTY = Overlong(MAX_BLOCKS, buffer=0, factor=0.0)


@dataclass
class Engines:
    """A pool with a clock. All engines advance together, one block of every running response at a time."""

    version: int = 0
    now: float = 0.0
    """Seconds."""
    blocks: float = 0.0
    """Blocks that a response running since the start would have."""
    busy: float = 0.0
    """Slot-seconds in use."""
    _queue: deque[GenerationRequest] = field(default_factory=deque)
    _running: list[tuple[float, int, float, GenerationRequest]] = field(default_factory=list)
    """A heap of (blocks at the end, order, blocks at the start, request)."""
    _order: int = 0

    def submit(self, requests: Sequence[GenerationRequest], sampling: SamplingParams) -> None:
        self._queue.extend(requests)
        self._fill()

    def poll(self, timeout_s: float) -> list[RequestResult]:
        """The next response to finish, unless that takes longer than `timeout_s`."""
        if not self._running:
            self.now += 0.0 if math.isinf(timeout_s) else timeout_s
            return []
        seconds_per_block = BLOCK * (STEP_S + STEP_S_PER_RESPONSE * len(self._running) / ENGINES)
        seconds = (self._running[0][0] - self.blocks) * seconds_per_block
        passed = min(seconds, timeout_s)
        self.now += passed
        self.busy += passed * len(self._running)
        if seconds > timeout_s:
            self.blocks += timeout_s / seconds_per_block
            return []
        self.blocks, _, _, request = heapq.heappop(self._running)
        self._fill()
        return [self._settled(request, length(request) - len(request.prefix), "stop")]

    def abort(self) -> list[RequestResult]:
        settled = [self._settled(r, int(self.blocks - start), "abort") for _, _, start, r in self._running]
        settled += [self._settled(request, 0, "abort") for request in self._queue]
        self._running.clear()
        self._queue.clear()
        return settled

    def _fill(self) -> None:
        while self._queue and len(self._running) < ENGINES * SLOTS_PER_ENGINE:
            request = self._queue.popleft()
            end = self.blocks + length(request) - len(request.prefix)
            heapq.heappush(self._running, (end, self._order, self.blocks, request))
            self._order += 1

    def _settled(self, request: GenerationRequest, blocks: int, reason: str) -> RequestResult:
        return RequestResult(
            request.request_id,
            Generation(np.zeros(blocks, np.int32), np.zeros(blocks, np.float32), reason, self.version),
        )


def length(request: GenerationRequest) -> int:
    """Blocks of the complete response, from its seed and its prompt."""
    difficulty = random.Random(request.prompt_ids[0]).gauss(0, PROMPT_SPREAD)
    tokens = MEDIAN_LENGTH * math.exp(difficulty + random.Random(request.seed).gauss(0, RESPONSE_SPREAD))
    return min(max(round(tokens / BLOCK), 1), MAX_BLOCKS)


def score(request: ScoreRequest) -> list[Score]:
    group_id = f"{request.key}-{request.problem.problem_id}"
    informative = random.Random(f"informative {group_id}").random() < INFORMATIVE
    return [Score(0.0, float(informative and i == 0), "") for i in range(len(request.responses))]


class Scorers:
    """Scoring that takes no time."""

    def __init__(self) -> None:
        self._results: list[ScoreResult] = []

    def submit(self, request: ScoreRequest) -> None:
        self._results.append(ScoreResult(request, score(request)))

    def poll(self, timeout_s: float) -> list[ScoreResult]:
        return self.finish()

    def finish(self) -> list[ScoreResult]:
        results, self._results = self._results, []
        return results


@dataclass
class Iteration:
    """Tokens are in blocks; `end` and `busy` are the clock and the used slot-seconds when it ended."""

    groups: list[ScoredGroup]
    prompts: int
    generated: int
    dropped: int
    """Of informative groups never trained on, or unfinished ones."""
    unused_share: float
    """Of the responses of informative groups."""
    version: int
    end: float
    busy: float


Policy = Callable[[Engines, int], list[Iteration]]


def rounds(prompts_per_round: int) -> Policy:
    """Rounds until there are enough groups, the rest discarded, then the update."""

    def run(engines: Engines, iterations: int) -> list[Iteration]:
        done: list[Iteration] = []
        serials = itertools.count()
        for version in range(iterations):
            engines.version = version
            informative: list[ScoredGroup] = []
            prompts = generated = 0
            while len(informative) < TARGET:
                groups = _round(engines, list(itertools.islice(serials, prompts_per_round)))
                prompts += prompts_per_round
                generated += sum(group.tokens for group in groups)
                scored = [trajectories(group, score(group.score_request()), NO_PENALTY) for group in groups]
                informative += [group for group in scored if group[0].accuracy]
            used, surplus = informative[:TARGET], informative[TARGET:]
            dropped = sum(t.response_length for group in surplus for t in group)
            _wait(engines, used)
            unused_share = len(surplus) / len(informative)
            done.append(
                Iteration(used, prompts, generated, dropped, unused_share, version, engines.now, engines.busy)
            )
        return done

    return run


def _round(engines: Engines, serials: Sequence[int]) -> list[PromptGroup]:
    """Generate all responses to these prompts."""
    groups = {
        serial: PromptGroup(
            serial, Problem(str(serial), (serial,), "", "", ""), [Response() for _ in range(RESPONSES)]
        )
        for serial in serials
    }
    for group in groups.values():
        engines.submit(group.requests(seed=1), SamplingParams(1.0, 1.0, MAX_BLOCKS))
    for _ in range(len(groups) * RESPONSES):
        for settled in engines.poll(math.inf):
            serial, index = parse_request_id(settled.request_id)
            assert settled.generation is not None
            groups[serial].responses[index].add(settled.generation)
    return list(groups.values())


def collected(mode: str, unfinished: str, prompts_in_flight: int, max_staleness: int) -> Policy:
    """The collector, driven as the training loop does in each mode."""

    def run(engines: Engines, iterations: int) -> list[Iteration]:
        problems = [Problem(str(index), (index,), str(index), "", "") for index in range(40_000)]
        config = RolloutConfig(
            mode=mode, unfinished=unfinished, prompts_in_flight=prompts_in_flight, max_staleness=max_staleness
        )
        collector = Collector(
            Dataset(problems, 1),
            engines,
            Scorers(),
            AllWrongWatch(str, print),
            config,
            NO_PENALTY,
            target_groups=TARGET,
            responses_per_prompt=RESPONSES,
            seed=1,
        )
        done = []
        for version in range(iterations):
            engines.version = version
            collector.resume(version)
            while not collector.enough:
                collector.step(math.inf)
            if mode == "synchronous":
                collector.pause()
            result = collector.pop_batch()
            if mode == "synchronous":
                _wait(engines, result.groups)
            else:
                update_ends = engines.now + _update_seconds(result.groups)
                while engines.now < update_ends:
                    collector.step(update_ends - engines.now)
                while mode == "one_step_off" and not collector.enough:
                    collector.step(math.inf)
                collector.pause()
            counts = result.counts
            tokens = counts.generated_tokens, counts.dropped_tokens
            done.append(
                Iteration(
                    result.groups,
                    counts.prompts,
                    *tokens,
                    counts.unused_share,
                    version,
                    engines.now,
                    engines.busy,
                )
            )
        return done

    return run


def _update_seconds(groups: Sequence[ScoredGroup]) -> float:
    return sum(t.response_length for group in groups for t in group) * BLOCK * TRAIN_S_PER_TOKEN


def _wait(engines: Engines, groups: Sequence[ScoredGroup]) -> None:
    engines.now += _update_seconds(groups)


POLICIES: dict[str, Policy] = {
    "reference: rounds of 2,048, surplus discarded": rounds(2_048),
    "rounds of 1,408, surplus discarded": rounds(1_408),
    **{
        f"{mode}, drop, {in_flight:,} in flight": collected(mode, "drop", in_flight, 1)
        for mode in ("synchronous", "one_step_off")
        for in_flight in (512, 1_408)
    },
    **{
        f"synchronous, continue, {in_flight:,} in flight, staleness {staleness}": collected(
            "synchronous", "continue", in_flight, staleness
        )
        for in_flight in (512, 1_024, 2_048)
        for staleness in (1, 3)
    },
    "one_step_off, continue, 512 in flight, staleness 3": collected("one_step_off", "continue", 512, 3),
    **{
        f"fully_asynchronous, continue, 512 in flight, staleness {staleness}": collected(
            "fully_asynchronous", "continue", 512, staleness
        )
        for staleness in (1, 2, 4)
    },
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--iterations", type=int, default=8)
    options.add_argument(
        "--only", default="", help="policies whose name contains this, besides the reference"
    )
    options.add_argument("--warmup", type=int, default=3, help="first iterations, left out of the table")
    arguments = options.parse_args()
    print("A simulation, not a measurement. Means per iteration; time relative to the reference policy.\n")
    print(table(HEADS, []))
    reference_seconds = None
    for index, (name, policy) in enumerate(POLICIES.items()):
        if index and arguments.only not in name:
            continue
        done = policy(Engines(), arguments.iterations)
        first, rest = done[arguments.warmup - 1], done[arguments.warmup :]
        seconds = (rest[-1].end - first.end) / len(rest)
        reference_seconds = reference_seconds or seconds
        cells = _cells(first, rest)
        time = f"{seconds / reference_seconds:.2f} ({seconds / 60:.0f} min)"
        print("| " + " | ".join((name, time, *cells)) + " |", flush=True)


HEADS = (
    "policy",
    "time",
    "prompts",
    "unused informative responses",
    "tokens generated / used",
    "of them dropped",
    "slots busy",
    "mean length used",
    "staleness mean",
    "tokens of age >= 1",
)


def _cells(first: Iteration, rest: Sequence[Iteration]) -> tuple[str, ...]:
    """Columns from `prompts` on, of the iterations after `first`."""
    used = sum(t.response_length for i in rest for group in i.groups for t in group)
    responses = sum(len(group) for i in rest for group in i.groups)
    generated, dropped = sum(i.generated for i in rest), sum(i.dropped for i in rest)
    stale = [staleness_values([t for group in i.groups for t in group], i.version) for i in rest]
    busy = (rest[-1].busy - first.busy) / (rest[-1].end - first.end) / (ENGINES * SLOTS_PER_ENGINE)
    return (
        f"{sum(i.prompts for i in rest) / len(rest):,.0f}",
        f"{rest[-1].unused_share:.1%}",
        f"{generated / used:.2f}",
        f"{dropped / generated:.1%}",
        f"{busy:.0%}",
        f"{used * BLOCK / responses:,.0f}",
        f"{_mean(stale, 'staleness/mean'):.2f}",
        f"{1 - _mean(stale, 'staleness/tokens_age_0'):.0%}",
    )


def _mean(values: Sequence[dict[str, float]], name: str) -> float:
    return sum(value[name] for value in values) / len(values)


if __name__ == "__main__":
    main()
