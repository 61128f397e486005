"""A simulation of dynamic sampling: tokens wasted and time taken with each setting of `rollout.mode` and `rollout.unfinished`.

    python -m tools.bench.surplus            # some minutes; prints a table for docs/benchmarks.md

This is `megatron_fipo.simulate`, so the driver's own collector and dispatch, with round figures instead of the planner's:

- Response lengths are log-normal, with one factor per prompt and one per response, cut at 20,480 tokens.
- A prompt is informative with probability 0.4, independently of its length.
- A step of an engine takes longer the more responses it runs, and not the more tokens they have. Prefill costs nothing.
- The trainer takes a fixed time per token and has separate devices. Weight pushes cost nothing.

The reference policy is the authors': rounds of 2,048 prompts, wait for all, train on the first 512 informative groups,
discard the rest.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_fipo.config import BatchConfig, Config, RolloutConfig
from megatron_fipo.driver.rollout.prompt_group import PromptGroup, Response, parse_request_id
from megatron_fipo.engine.protocol import SamplingParams
from megatron_fipo.simulate.iteration import Scenario, Simulation
from megatron_fipo.simulate.pool import Clock, SimulatedPool
from megatron_fipo.simulate.responses import Responses, problems
from megatron_fipo.simulate.times import Times
from tools.bench.harness import parser, table

LENGTHS = Responses(
    median=3_500.0, prompt_spread=0.6, response_spread=0.6, limit=20_480, prompt_tokens=1, informative=0.4
)
TARGET, PER_PROMPT = 512, 16
ENGINES, SLOTS_PER_ENGINE = 32, 256
STEP_S, STEP_S_PER_RESPONSE = 0.012, 0.00006
"""Time of an engine's decode step, and its increase per response."""
TRAIN_S_PER_TOKEN = 15e-6
TIMES = Times(
    decode_step=lambda sequences, tokens: STEP_S + STEP_S_PER_RESPONSE * sequences,
    prefill=lambda tokens: 0.0,
    score=lambda length: 0.0,
    update=lambda length: TRAIN_S_PER_TOKEN * TARGET * PER_PROMPT * length,
    sync=0.0,
    save=0.0,
    cache_tokens=None,
    max_sequences=SLOTS_PER_ENGINE,
    requests_per_call=16,
    calls_at_once=64,
)


@dataclass
class Iteration:
    """Counts of tokens and prompts; `end` is the clock when it ended."""

    prompts: int
    generated: int
    dropped: int
    """Of informative groups never trained on, or unfinished ones."""
    unused_share: float
    """Of the responses of informative groups."""
    used: int
    staleness: dict[str, float]
    end: float
    sequence_s: float
    """Running responses, summed over seconds."""


Policy = Callable[[int], list[Iteration]]


def rounds(prompts_per_round: int) -> Policy:
    """Rounds until there are enough groups, the rest discarded, then the update."""

    def run(iterations: int) -> list[Iteration]:
        pool = SimulatedPool(RolloutConfig(num_engines=ENGINES), TIMES, LENGTHS, Clock())
        pool.updated(range(ENGINES), 0)
        serials = itertools.count()
        return [_iteration_of_rounds(pool, serials, prompts_per_round) for _ in range(iterations)]

    return run


def _iteration_of_rounds(
    pool: SimulatedPool, serials: "itertools.count[int]", prompts_per_round: int
) -> Iteration:
    informative: list[PromptGroup] = []
    prompts = generated = 0
    while len(informative) < TARGET:
        groups = _round(pool, list(itertools.islice(serials, prompts_per_round)))
        prompts += prompts_per_round
        generated += sum(group.tokens for group in groups)
        informative += [group for group in groups if LENGTHS.scores(group.score_request())[0].accuracy]
    used, surplus = informative[:TARGET], informative[TARGET:]
    tokens = sum(group.tokens for group in used)
    pool.clock.advance(TRAIN_S_PER_TOKEN * tokens)
    return Iteration(
        prompts,
        generated,
        sum(group.tokens for group in surplus),
        len(surplus) / len(informative),
        tokens,
        {"staleness/mean": 0.0, "staleness/tokens_age_0": 1.0},
        pool.clock.now,
        pool.take_engine_usage().sequence_s,
    )


def _round(pool: SimulatedPool, serials: Sequence[int]) -> list[PromptGroup]:
    """Generate all responses to these prompts."""
    prompts = problems(LENGTHS.prompt_tokens)
    groups = {
        serial: PromptGroup(serial, prompts[serial % len(prompts)], [Response() for _ in range(PER_PROMPT)])
        for serial in serials
    }
    for group in groups.values():
        pool.submit(group.requests(seed=1), SamplingParams(1.0, 1.0, LENGTHS.limit))
    while pool.outstanding:
        for settled in pool.poll(math.inf):
            serial, index = parse_request_id(settled.request_id)
            assert settled.generation is not None
            groups[serial].responses[index].add(settled.generation)
    return list(groups.values())


def collected(mode: str, unfinished: str, prompts_in_flight: int, max_staleness: int) -> Policy:
    """The collector, driven as the training loop does in each mode."""

    def run(iterations: int) -> list[Iteration]:
        rollout = RolloutConfig(
            engine="vllm",
            num_engines=ENGINES,
            mode=mode,
            unfinished=unfinished,
            prompts_in_flight=prompts_in_flight,
            max_staleness=max_staleness,
        )
        batch = BatchConfig(prompts_per_iteration=TARGET, responses_per_prompt=PER_PROMPT)
        simulation = Simulation(Scenario(Config(batch=batch, rollout=rollout), TIMES, LENGTHS))
        return [_iteration(simulation) for _ in range(iterations)]

    return run


def _iteration(simulation: Simulation) -> Iteration:
    done = simulation.iterate()
    counts = done.counts
    return Iteration(
        counts.prompts,
        counts.generated_tokens,
        counts.dropped_tokens,
        counts.unused_share,
        done.response_tokens,
        done.staleness,
        done.end,
        done.usage.sequence_s,
    )


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
        done = policy(arguments.iterations)
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
    used, generated = sum(i.used for i in rest), sum(i.generated for i in rest)
    busy = sum(i.sequence_s for i in rest) / (rest[-1].end - first.end) / (ENGINES * SLOTS_PER_ENGINE)
    stale = [i.staleness for i in rest]
    return (
        f"{sum(i.prompts for i in rest) / len(rest):,.0f}",
        f"{rest[-1].unused_share:.1%}",
        f"{generated / used:.2f}",
        f"{sum(i.dropped for i in rest) / generated:.1%}",
        f"{busy:.0%}",
        f"{used / (len(rest) * TARGET * PER_PROMPT):,.0f}",
        f"{_mean(stale, 'staleness/mean'):.2f}",
        f"{1 - _mean(stale, 'staleness/tokens_age_0'):.0%}",
    )


def _mean(values: Sequence[dict[str, float]], name: str) -> float:
    return sum(value[name] for value in values) / len(values)


if __name__ == "__main__":
    main()
