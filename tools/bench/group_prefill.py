"""What the responses to one prompt share: prompt tokens that vLLM computes, and the time, with its prefix cache and without.

    python -m tools.bench.group_prefill [--prompt 1500] [--responses 16] [--rounds 5]

One engine on this machine, a random Qwen2 of 8 layers, one token for each response. The prompts of the rounds differ.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from megatron_fipo.engine.protocol import GenerationRequest, SamplingParams
from megatron_fipo.engine.vllm_engine import VLLMEngine

TOKENIZER = Path(__file__).parents[2] / "examples/countdown/base-model"


def save_model(folder: str, longest: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=longest,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


async def measure(engine: VLLMEngine, prompt: int, responses: int, rounds: int) -> tuple[float, float, float]:
    """Median seconds of a call, and of each call the tokens of the prompts and those of them that were computed."""
    await engine.ready()
    sampling = SamplingParams(1.0, 1.0, 1)
    seconds = []
    before = await engine.status()
    for number in range(rounds + 1):
        tokens = tuple(3 + (7 * position + 11 * number) % 13 for position in range(prompt))
        requests = [GenerationRequest(f"{number}/{index}", tokens, index) for index in range(responses)]
        if number == 1:
            before = await engine.status()  # the first call warms up
        start = time.perf_counter()
        await engine.generate(requests, sampling)
        seconds.append(time.perf_counter() - start)
    after = await engine.status()
    queries = after.prefix_queries - before.prefix_queries or rounds * responses * prompt
    computed = queries - (after.prefix_hits - before.prefix_hits)
    return statistics.median(seconds[1:]), queries / rounds, computed / rounds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", type=int, default=1500)
    parser.add_argument("--responses", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    longest = arguments.prompt + 8
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner:
        save_model(folder, longest)
        print("prefix cache  seconds  prompt tokens  computed")
        for cache in (True, False):
            options: dict[str, Any] = {
                "enable_prefix_caching": cache,
                "max_num_batched_tokens": 2 * 16 * longest,
            }
            engine = VLLMEngine(folder, "float32", max_model_len=longest, arguments=options)
            found = runner.run(measure(engine, arguments.prompt, arguments.responses, arguments.rounds))
            engine._llm.shutdown()
            print(f"{'on' if cache else 'off':12s}  {found[0]:7.2f}  {found[1]:13,.0f}  {found[2]:8,.0f}")


if __name__ == "__main__":
    main()
