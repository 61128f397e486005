"""How long everything takes: the only figures that a simulation has of hardware."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_fipo.engine.protocol import RolloutEngine
from megatron_fipo.engine.registry import calls_at_once
from megatron_fipo.plan.case import Case
from megatron_fipo.plan.estimate import Estimate, total
from megatron_fipo.plan.memory.engine import engine_memory
from megatron_fipo.plan.time.engine import decode_step, prefill
from megatron_fipo.plan.time.trainer import score_time, update_time
from megatron_fipo.plan.time.transfers import save_time, sync_time
from megatron_fipo.simulate.operation import Operation

CACHED_TOKENS = 2.0**20
"""Tokens from which the time per cached token is taken."""
PREFILL_TOKENS = 8_192.0
"""The batch of tokens from which the time per token is taken: vLLM's largest step."""


@dataclass(frozen=True)
class Times:
    """Seconds, and sizes of one engine. Functions must be cheap: `decode_step` is called for each event of an engine."""

    decode_step: Callable[[int, float], float]
    """Seconds of one decoding step of one engine, from its running sequences and the tokens in its KV cache. Steps without an
    event between them are charged at their mean number of tokens, which is exact where the function is affine in it."""
    prefill: Callable[[float], float]
    """Seconds in which an engine computes this many tokens of prompts and prefixes. Its decoding waits meanwhile."""
    score: Callable[[float], float]
    """Seconds of the old log-probs of a full batch, from the mean response length in tokens."""
    update: Callable[[float], float]
    """Seconds of the mini-steps of a full batch, from the mean response length in tokens."""
    sync: float
    """Seconds of a weight push; engines and trainer wait."""
    save: float
    """Seconds for which a checkpoint stops the run."""
    cache_tokens: int | None
    """Tokens that the KV cache of an engine holds; None if it grows as needed."""
    max_sequences: int
    """Sequences that an engine decodes at one time."""
    requests_per_call: int
    """`RolloutEngine.requests_per_call` and `calls_at_once`."""
    calls_at_once: int
    engine_restart: float = 0.0
    """Seconds from the loss of an engine until another has loaded."""
    sleep: float = 0.0
    """Seconds in which colocated engines free their memory, and `wake` in which they take it again."""
    wake: float = 0.0


@dataclass(frozen=True)
class Basis:
    """What the planner's times rest on."""

    sources: frozenset[str]
    not_calibrated: frozenset[str]


def times_of(case: Case, operation: Operation, bound: str = "value") -> Times:
    """The planner's times of a case; `bound` is "value", or "low" or "high" for the ends of its intervals."""

    def at_bound(estimate: Estimate) -> float:
        return getattr(estimate, bound)

    engine = _engine_class(case.config.rollout.engine)
    calls = calls_at_once(engine, case.config.rollout)
    most = engine.requests_per_call * calls
    per_cached = (
        at_bound(decode_step(case, 1.0, CACHED_TOKENS)) - at_bound(decode_step(case, 1.0, 0.0))
    ) / CACHED_TOKENS
    points = sorted({min(round(1.25**power), most) for power in range(64)})
    by_sequences = [at_bound(decode_step(case, float(sequences), 0.0)) for sequences in points]
    step: list[float] = np.interp(np.arange(most + 1), points, by_sequences).tolist()
    per_token = at_bound(prefill(case, PREFILL_TOKENS)) / PREFILL_TOKENS
    return Times(
        # The planner's step is linear in the cached tokens, and not quite in the sequences.
        decode_step=lambda sequences, tokens: step[sequences] + per_cached * tokens,
        prefill=lambda tokens: per_token * tokens,
        score=lambda length: at_bound(score_time(case.at(length)).total),
        update=lambda length: at_bound(update_time(case.at(length)).total),
        sync=at_bound(sync_time(case)),
        save=at_bound(save_time(case)),
        cache_tokens=_cache_tokens(case, bound),
        max_sequences=most,
        requests_per_call=engine.requests_per_call,
        calls_at_once=calls,
        engine_restart=operation.engine_restart_s,
        sleep=operation.sleep_s,
        wake=operation.wake_s,
    )


def basis_of(case: Case) -> Basis:
    """What the times of a case rest on."""
    estimates = [
        decode_step(case, 1.0, 1.0),
        prefill(case, 1.0),
        score_time(case).total,
        update_time(case).total,
        sync_time(case),
        save_time(case),
    ]
    everything = total(estimates)
    return Basis(everything.sources, everything.not_calibrated)


def _cache_tokens(case: Case, bound: str) -> int | None:
    """Of an engine; the time is low if the cache is large. Its lowest size still holds a sequence, as vLLM would demand."""
    rollout = case.config.rollout
    if rollout.engine != "vllm":
        return None
    tokens = engine_memory(case).cache_tokens
    if bound == "high":
        return int(min(tokens.value, max(tokens.low, rollout.longest_sequence)))
    return int(tokens.high if bound == "low" else tokens.value)


def _engine_class(name: str) -> type[RolloutEngine]:
    """The class of `rollout.engine`, whether or not its library is installed: only its constants are read."""
    if name == "vllm":
        from megatron_fipo.engine.vllm_engine import VLLMEngine

        return VLLMEngine  # type: ignore[return-value]
    from megatron_fipo.engine.local import LocalEngine

    return LocalEngine
