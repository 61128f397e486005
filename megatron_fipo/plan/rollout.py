"""How long the rollouts of an iteration take: continuous batching on one engine, and what the other engines add.

Every engine gets its share of the responses and starts them as its cache allows. A decoding step makes one token of each
running response, and its time depends on how many run and on the keys and values they hold (`plan.time.engine`). When the
queue is empty, fewer and fewer responses run: the tail. It is followed in blocks of tokens, because the mean hides it.

    unfinished=drop       an iteration starts its prompts at once and waits for the last response that it needs
    unfinished=continue   the engines stay full, so an iteration takes its share of a steady state, without a tail

Ignored: the second prefill of responses that had to wait, groups that finish early and free the rest of their prompt, and
the time in which the collector tops up after uninformative groups in the tail of `drop` (up to a quarter of the rollout).
`megatron-fipo simulate` has them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from megatron_fipo.plan.case import Case
from megatron_fipo.plan.estimate import Breakdown, Estimate
from megatron_fipo.plan.memory.engine import USED_SHARE, engine_memory, max_sequences
from megatron_fipo.plan.time.engine import decode_step, prefill
from megatron_fipo.plan.workload import Workload

BLOCK = 128
"""Tokens by which all responses of an engine advance at a time."""
IMBALANCE = 0.05
"""Share by which the slowest engine may take longer than the mean: the sum of its random lengths, and their order."""

FOLLOWED = 8_192
"""Responses of an engine that are followed in blocks, at most; those before them run as in the steady state."""

StepSeconds = Callable[[float, float], float]
"""Seconds of a decoding step, from the responses that run and the tokens in their caches."""


@dataclass(frozen=True)
class Decoding:
    """What one engine did."""

    seconds: float
    mean_running: float
    """Responses, over time."""
    full_seconds: float
    """Of `seconds`, until the queue was empty: from then on the tail."""

    def after(self, earlier: "Decoding") -> "Decoding":
        """Both as one, where the queue of `earlier` never was empty."""
        seconds = earlier.seconds + self.seconds
        running = (earlier.mean_running * earlier.seconds + self.mean_running * self.seconds) / seconds
        return Decoding(seconds, running, earlier.seconds + self.full_seconds)


def rollout_time(case: Case, progress: float = 1.0) -> Breakdown:
    """Seconds in which the engines make the responses of one iteration, from the first request to the last response.

    Parts: `prefill`, `decode` (while responses wait for a place) and `tail` (until the last response ends).
    """
    workload = case.workload(progress)
    tail = case.config.rollout.unfinished == "drop"
    return responses_time(case, workload, workload.sampled, tail, _surplus(case, workload))


def decoding_seconds(case: Case) -> float:
    """The value of `rollout_time` alone, without prefill: enough to compare engines."""
    workload, tail = case.workload(), case.config.rollout.unfinished == "drop"
    engines = case.config.rollout.num_engines
    share, surplus = math.ceil(workload.sampled / engines), math.ceil(_surplus(case, workload) / engines)
    return decode_engine(case, workload, share, tail, surplus)[0].seconds


def _surplus(case: Case, workload: Workload) -> int:
    """Responses that `drop` starts besides those it needs: prompts_in_flight prompts are started at once."""
    rollout, per_prompt = case.config.rollout, case.config.batch.responses_per_prompt
    if rollout.unfinished == "continue":
        return 0
    return max(0, min(rollout.prompts_in_flight, rollout.max_prompts) * per_prompt - workload.sampled)


def responses_time(case: Case, workload: Workload, responses: int, tail: bool, surplus: int = 0) -> Breakdown:
    """As `rollout_time`, for this many responses of the workload's lengths, with `surplus` others in the queue after them."""
    rollout = case.config.rollout
    engines = rollout.num_engines
    share = math.ceil(responses / engines)
    bounds = decode_engine(case, workload, share, tail, math.ceil(surplus / engines))
    step = decode_step(case, bounds[0].mean_running, 1.0)
    slowest = 1 + IMBALANCE if tail and engines > 1 else 1.0
    full = _within([bound.full_seconds for bound in bounds], step)
    rest = _within([bound.seconds - bound.full_seconds for bound in bounds], step, slowest)
    # The responses to a prompt are one call, and a prefix cache keeps the prompt for all but the first of them.
    caches = rollout.vllm.get("enable_prefix_caching", not case.config.deterministic)
    cached = rollout.engine == "vllm" and caches
    prompts = share / (case.config.batch.responses_per_prompt if cached else 1)
    return Breakdown(
        {"prefill": prefill(case, prompts * workload.prompt_tokens), "decode": full, "tail": rest}
    )


def decode_engine(
    case: Case, workload: Workload, responses: int, tail: bool, surplus: int = 0
) -> list[Decoding]:
    """One engine makes `responses` responses, before it may have made `surplus` others: with the value, the low and the high
    bound of its step times."""
    rollout = case.config.rollout
    cache_tokens = USED_SHARE * engine_memory(case).cache_tokens.value
    in_flight = rollout.prompts_in_flight * case.config.batch.responses_per_prompt / rollout.num_engines
    slots = min(max_sequences(rollout), math.ceil(in_flight))
    steps = _steps_of(case)
    if not tail:
        return [steady(workload, responses, slots, cache_tokens, step) for step in steps]
    followed = min(responses, FOLLOWED)
    lengths = shuffled_lengths(workload, followed + min(surplus, FOLLOWED))
    blocks = decoded_blocks(lengths, workload.prompt_tokens, slots, cache_tokens, needed=followed)
    earlier = responses - followed
    return [
        blocks.timed(step).after(steady(workload, earlier, slots, cache_tokens, step))
        if earlier
        else blocks.timed(step)
        for step in steps
    ]


def _steps_of(case: Case) -> list[StepSeconds]:
    """`decode_step` as numbers: value, low and high. For each number of responses it is a line in the tokens of the cache."""

    @cache
    def line(running: float) -> tuple[Estimate, Estimate]:
        return decode_step(case, running, 0.0), decode_step(case, running, 1e6)

    def step_of(bound: str) -> StepSeconds:
        def step(running: float, cached: float) -> float:
            empty, filled = (getattr(end, bound) for end in line(running))
            return empty + (filled - empty) * cached / 1e6

        return step

    return [step_of(bound) for bound in ("value", "low", "high")]


def shuffled_lengths(workload: Workload, responses: int) -> np.ndarray:
    """[responses] lengths with the law's distribution, in an order that mixes short and long evenly.

    The i-th has quantile frac(i · golden ratio): for 3 responses 0.62, 0.24, 0.85.
    """
    quantiles = np.asarray(workload.response.quantiles)
    positions = np.arange(1, responses + 1) * ((math.sqrt(5) - 1) / 2) % 1.0
    return quantiles[(positions * len(quantiles)).astype(int)]


@dataclass(frozen=True)
class Blocks:
    """What an engine decodes, block by block, whatever a step takes."""

    steps: list[float]
    """Tokens by which the longest response advances."""
    running: list[float]
    """Responses, on average over the steps."""
    cached: list[float]
    """Tokens in the cache, on average over the steps."""
    queued: list[bool]
    """Whether responses wait."""

    def timed(self, step: StepSeconds) -> Decoding:
        seconds = [
            steps * step(running, cached)
            for steps, running, cached in zip(self.steps, self.running, self.cached, strict=True)
        ]
        whole = sum(seconds)
        mean = sum(passed * running for passed, running in zip(seconds, self.running, strict=True)) / whole
        last = max((index for index, queued in enumerate(self.queued) if queued), default=-1)
        return Decoding(whole, mean, sum(seconds[: last + 1]))


def decoded_blocks(
    lengths: np.ndarray, prompt_tokens: float, slots: int, cache_tokens: float, needed: int | None = None
) -> Blocks:
    """The blocks of responses of these lengths, made in order, at most `slots` at a time and as many as the cache holds,
    until the first `needed` have ended (all of them if None).

    As vLLM does it: a response starts when the cache has space for its prompt, and when the cache is full the newest ones
    wait until others end. The oldest always runs.
    """
    blocks = Blocks([], [], [], [])
    count = len(lengths)
    needed = count if needed is None else needed
    # The next to start is the last row.
    waiting = np.column_stack([lengths, np.full(count, prompt_tokens), np.arange(count)])[::-1]
    running = np.empty((0, 3))
    while (waiting[-1:, 2] < needed).any() or (running[:, 2] < needed).any():
        waiting, running = _admit(waiting, running, slots, cache_tokens)
        remaining, held, order = running.T
        steps = min(BLOCK, remaining.max())
        advanced = np.minimum(remaining, steps)
        blocks.steps.append(float(steps))
        blocks.running.append(float(round(advanced.sum() / steps)))
        blocks.cached.append(float(held.sum() + advanced.sum() / 2))
        blocks.queued.append(len(waiting) > 0)
        running = np.column_stack([remaining - advanced, held + advanced, order])[remaining > advanced]
    return blocks


def _admit(
    waiting: np.ndarray, running: np.ndarray, slots: int, cache_tokens: float
) -> tuple[np.ndarray, np.ndarray]:
    """Waiting and running responses before a block: rows of remaining tokens, held tokens and place in the order.

    Running rows are oldest first, waiting rows in reverse, so that those that stop running are the next to start. Example:
    running A, B and waiting D, C give running A, B, C and waiting D if the cache holds three, and running A and waiting D, C,
    B if it holds one.
    """
    free = max(slots - len(running), 0)
    kept, started = np.split(waiting, [max(len(waiting) - free, 0)])
    candidates = np.concatenate([running, started[::-1]])
    needed = np.cumsum(candidates[:, 1] + np.minimum(candidates[:, 0], BLOCK))
    count = max(int(np.searchsorted(needed, cache_tokens, side="right")), 1)
    return np.concatenate([kept, candidates[count:][::-1]]), candidates[:count]


def steady(
    workload: Workload, responses: int, slots: int, cache_tokens: float, step: StepSeconds
) -> Decoding:
    """The time of `responses` responses on an engine that always starts the next when one ends."""
    held = workload.held_tokens
    running = max(min(slots, cache_tokens / held), 1.0)
    seconds = responses * workload.response.mean / running * step(running, running * held)
    return Decoding(seconds, running, seconds)


def _within(seconds: Sequence[float], basis: Estimate, slowest: float = 1.0) -> Estimate:
    """Of value, low and high, with what `basis` rests on; the high bound times `slowest`."""
    return Estimate(seconds[0], min(seconds), max(seconds) * slowest, basis.sources, basis.not_calibrated)
