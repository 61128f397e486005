"""Responses of up to 20,480 tokens through the real vLLM: calls far longer than every limit on an engine's silence."""

import json
import time

import pytest

from megatron_fipo.config import RolloutConfig
from megatron_fipo.driver.rollout.pool import EnginePool, PoolCounts
from megatron_fipo.driver.rollout.prompt_group import GroupRequest
from megatron_fipo.engine.protocol import GenerationRequest, SamplingParams
from megatron_fipo.engine.vllm_engine import VLLMEngine
from megatron_fipo.tasks.task import Problem
from tests.generations import ids
from tests.system.runs import iterations, run
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
    # Each token is an answer (in the byte-level notation of Qwen2's tokenizer), and half of them are right, so that a
    # group of random responses is informative.
    answers = [f"{token}ĠAnswer:Ġ{7 + token % 2}Ċ" for token in range(3, VOCABULARY)]
    save_tokenizer(tmp_path, ["<pad>", "<eos>", "q", *answers])
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
        vocab_size=VOCABULARY,
        gpus_per_engine=0,
        keep_batches=False,
        loaded_weights_serve=True,
    )
    try:
        requests = [GenerationRequest(str(seed), (5, 6, 7), seed) for seed in range(16)]
        pool.loaded(wait=True)
        start = time.monotonic()
        generations = pool.generate(
            [GroupRequest(Problem("p", (5, 6, 7), "", "", ""), requests, SamplingParams(1.0, 1.0, LIMIT))]
        )
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


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_an_iteration_trains_on_responses_of_ten_thousand_tokens(folder, tmp_path):
    """From vLLM to the update, with limits on an engine's silence far below the length of its calls."""
    row = {"prompt": "q", "reward_model": {"ground_truth": "7"}, "data_source": "test"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    run_dir = tmp_path / "run"
    settings = [
        f"model.path={folder}",
        "model.dtype=float32",
        "batch.prompts_per_iteration=1",
        "batch.responses_per_prompt=8",
        "batch.mini_batch_prompts=1",
        f"batch.max_tokens_per_micro_batch={LIMIT + PROMPT + 8}",
        "rollout.engine=vllm",
        "rollout.num_engines=1",
        "rollout.health_timeout_s=15",
        "rollout.stall_timeout_s=10",
        "rollout.max_restarts=0",
        "rollout.max_retries=0",
        "rollout.prompts_in_flight=1",
        f"rollout.max_prompt_length={PROMPT}",
        f"rollout.max_response_length={LIMIT}",
        "data.source=jsonl",
        f"data.train_path={tmp_path / 'rows.jsonl'}",
        "reward.name=dapo_math",
        "reward.overlong_buffer=0",
        "evaluation.every=0",
        "evaluation.before_training=false",
        "iterations=1",
        f"run_dir={run_dir}",
    ]
    run("train", "examples/countdown/fipo.yaml", *settings, timeout=3000)
    (values,) = iterations(run_dir)
    print({name: value for name, value in values.items() if name.startswith(("length/", "time/"))})
    assert values["length/mean"] >= 8000
    assert values["time/rollout"] > 2 * 15
    assert sum(values[f"engines/{name}"] for name in ("retries", "restarts", "hangs", "malformed")) == 0
    assert values["policy/grad_norm"] > 0
