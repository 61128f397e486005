"""Decoding steps and prefill of the rollout engine that the run would use."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from megatron_fipo.calibrate.messages import Measured, Message
from megatron_fipo.calibrate.shapes import Batch, batches, prefill_operations
from megatron_fipo.calibrate.timing import clock_of
from megatron_fipo.engine.protocol import Generation, GenerationRequest, SamplingParams
from megatron_fipo.engine.registry import calls_at_once, engine_type
from megatron_fipo.plan.case import Case

MOST_ROUNDS = 5
LEAST_ROUNDS = 2


def measure(case: Case, until: float) -> Iterator[Message]:
    """`prefill` with (operations,), `decode` with (steps, sequences of all steps, cached tokens of all steps).

    Starts the engine; measures until `until` (of `time.monotonic`), and at least twice. Errors are the engine's own.
    """
    kind = engine_type(case.config.rollout.engine)
    engine = kind.load()(**kind.arguments(case.config, case.config.model.path, load_weights=True))
    with asyncio.Runner() as runner:
        yield from Decoder(case, engine, runner).measure(until)


class Decoder:
    """Calls an engine, whose methods may be coroutines."""

    def __init__(self, case: Case, engine: Any, runner: asyncio.Runner) -> None:
        self.case = case
        self.engine = engine
        self.runner = runner
        self.generator = np.random.default_rng(case.config.seed)
        own = not inspect.iscoroutinefunction(engine.generate)  # computes in this thread
        self.clock = clock_of(torch.device("cuda" if torch.cuda.is_available() or not own else "cpu"))

    def measure(self, until: float) -> Iterator[Message]:
        """One batch after another, so that those measured before an end in between count."""
        self._call("ready")
        most = self.engine.requests_per_call * calls_at_once(self.engine, self.case.config.rollout)
        wanted = batches(self.case.config, most)
        self._seconds(replace(wanted[0], new_tokens=min(4, wanted[0].new_tokens)))
        for index, batch in enumerate(wanted):
            left = until - time.monotonic()
            yield from self._repeated(batch, time.monotonic() + left / (len(wanted) - index))

    def _repeated(self, batch: Batch, until: float) -> Iterator[Message]:
        prefill: list[float] = []
        calls: list[float] = []
        features: list[tuple[float, float, float]] = []
        while len(calls) < LEAST_ROUNDS or (len(calls) < MOST_ROUNDS and time.monotonic() < until):
            prefill.append(self._seconds(replace(batch, new_tokens=1))[0])
            seconds, generations = self._seconds(batch)
            calls.append(seconds)
            features.append(decoded(batch, generations))
        operations = prefill_operations(self.case, batch.sequences * batch.prompt_tokens)
        yield Measured("prefill", (operations,), tuple(prefill))
        mean = np.mean(features, axis=0)
        if mean[0] > 0:
            first = float(np.median(prefill))
            seconds_after = tuple(max(seconds - first, seconds / 10) for seconds in calls)
            yield Measured("decode", tuple(map(float, mean)), seconds_after)

    def _seconds(self, batch: Batch) -> tuple[float, list[Generation]]:
        """Of one call with new random prompts: engines compute a prompt once that they have seen."""
        rollout = self.case.config.rollout
        prompts = self.generator.integers(
            self.case.architecture.vocab_size, size=(batch.sequences, batch.prompt_tokens)
        )
        requests = [
            GenerationRequest(str(index), tuple(map(int, prompt)), index)
            for index, prompt in enumerate(prompts)
        ]
        sampling = SamplingParams.of(rollout, batch.new_tokens, ())
        start = self.clock()
        generations = self._call("generate", requests, sampling)
        return self.clock() - start, generations

    def _call(self, method: str, *arguments: Any) -> Any:
        result = getattr(self.engine, method)(*arguments)
        return self.runner.run(_wait(result)) if inspect.isawaitable(result) else result


async def _wait(result: Awaitable[Any]) -> Any:
    return await result


def decoded(batch: Batch, generations: list[Generation]) -> tuple[float, float, float]:
    """Steps, and summed over them the sequences and the tokens in their caches. The first token is the prefill's.

    A response of 3 tokens to a prompt of 10 takes part in two steps, with 11 and 12 tokens.
    """
    steps = np.array([len(generation.response_ids) - 1 for generation in generations])
    cached = steps * batch.prompt_tokens + steps * (steps + 1) / 2
    return float(steps.max()), float(steps.sum()), float(cached.sum())
