"""Responses of up to 20,480 tokens through the real vLLM: calls far longer than every limit on an engine's silence."""

import time

import pytest

from megatron_fipo.config import RolloutConfig
from megatron_fipo.driver.rollout.pool import EnginePool, PoolCounts
from megatron_fipo.engine.protocol import GenerationRequest, SamplingParams
from megatron_fipo.engine.vllm_engine import VLLMEngine
from tests.generations import ids
from tests.tiny_qwen2 import save_qwen2, save_tokenizer

LIMIT, PROMPT = 20_480, 8
VOCABULARY = 12_288
"""Tokens are nearly equally likely, so the mean length is VOCABULARY * (1 - exp(-LIMIT / VOCABULARY)), about 10,000."""


@pytest.fixture
def folder(tmp_path):
    save_qwen2(
        tmp_path,
        0,
        hidden_size=128,
        intermediate_size=192,
        vocab_size=VOCABULARY,
        max_position_embeddings=LIMIT + PROMPT,
        num_hidden_layers=1,
        initializer_range=0.001,
    )
    save_tokenizer(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_healthy_engine_finishes_calls_of_many_minutes(cluster, folder):
    rollout = RolloutConfig(
        num_engines=1,
        max_prompt_length=PROMPT,
        max_response_length=LIMIT,
        health_timeout_s=15.0,
        stall_timeout_s=10.0,
        max_restarts=0,
        max_retries=0,
    )
    arguments = {"model_path": str(folder), "dtype": "float32", "max_model_len": LIMIT + PROMPT}
    pool = EnginePool(
        VLLMEngine,
        arguments,
        rollout,
        vocab_size=1000,
        gpus_per_engine=0,
        keep_batches=False,
        loaded_weights_serve=True,
    )
    try:
        requests = [GenerationRequest(str(seed), (5, 6, 7), seed) for seed in range(16)]
        pool.loaded(wait=True)
        start = time.monotonic()
        generations = pool.generate(requests, SamplingParams(1.0, 1.0, LIMIT))
        took = time.monotonic() - start
        lengths = [len(ids(generation)) for generation in generations]
        print(
            f"{sum(lengths):,} tokens in {took:.0f} s, mean {sum(lengths) / len(lengths):,.0f}, most {max(lengths):,}"
        )
        assert pool.take_counts() == PoolCounts()
        assert sum(lengths) / len(lengths) >= 8000
        assert took > 2 * rollout.health_timeout_s
    finally:
        pool.shutdown()
