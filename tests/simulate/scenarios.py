"""Small scenarios with times made by hand, so that results can be computed on paper."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megatron_fipo.config import Config, ModelConfig
from megatron_fipo.driver.rollout.dispatch import Call
from megatron_fipo.engine.protocol import GenerationRequest, SamplingParams
from megatron_fipo.simulate.engine import Running
from megatron_fipo.simulate.iteration import Scenario
from megatron_fipo.simulate.responses import Responses
from megatron_fipo.simulate.times import Times

SAMPLING = SamplingParams(1.0, 1.0, 1000)


def times(**changes: Any) -> Times:
    """One second per step, nothing else takes time, and the cache is as large as needed."""
    made = Times(
        decode_step=lambda sequences, tokens: 1.0,
        prefill=lambda tokens: 0.0,
        score=lambda length: 0.0,
        update=lambda length: 0.0,
        sync=0.0,
        save=0.0,
        cache_tokens=None,
        max_sequences=1024,
        requests_per_call=16,
        calls_at_once=64,
    )
    return replace(made, **changes)


def affine(fixed: float, per_sequence: float, per_token: float) -> Callable[[float, float], float]:
    """A decoding step."""
    return lambda sequences, tokens: fixed + per_sequence * sequences + per_token * tokens


def responses(**changes: Any) -> Responses:
    """Lengths around 100 tokens, at most 400."""
    made = Responses(
        median=80.0, prompt_spread=0.5, response_spread=0.5, limit=400, prompt_tokens=10, informative=0.5
    )
    return replace(made, **changes)


def config(**rollout: Any) -> Config:
    """8 groups of 4 responses per iteration."""
    made = Config(model=ModelConfig(path="m"), run_dir="r", iterations=20)
    made.batch.prompts_per_iteration, made.batch.responses_per_prompt, made.batch.mini_batch_prompts = 8, 4, 8
    settings = {
        "num_engines": 3,
        "placement": "separate",
        "prompts_in_flight": 16,
        "max_prompt_length": 20,
        "max_response_length": 400,
    }
    for name, value in (settings | rollout).items():
        assert hasattr(made.rollout, name)
        setattr(made.rollout, name, value)
    return made


def scenario(of: Times | None = None, lengths: Responses | None = None, **rollout: Any) -> Scenario:
    """By default `times()` and `responses()`."""
    return Scenario(config(**rollout), of or times(), lengths or responses())


def sequence(name: str, length: int, *, prompt: int = 10, done: int = 0) -> Running:
    """A response with a prompt of its own."""
    request = GenerationRequest(name, tuple(range(prompt)), seed=0)
    return Running(request, Call(0, SAMPLING, ()), length, done)
