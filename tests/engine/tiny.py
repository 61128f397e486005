"""A random Qwen2 model of 30k parameters, and requests to an engine that has it."""

from pathlib import Path

from megatron_fipo.driver.rollout.prompt_group import GroupRequest
from megatron_fipo.engine.protocol import GenerationRequest, SamplingParams
from megatron_fipo.tasks.task import Problem
from tests.tiny_qwen2 import ragged_prompts, save_qwen2, save_tokenizer


def save_model(folder: Path, seed: int = 0, tied: bool = True, end_token: bool = True) -> Path:
    save_tokenizer(folder, end_token=end_token)
    return save_qwen2(
        folder,
        seed,
        end_token=end_token,
        hidden_size=32,
        intermediate_size=64,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )


def some_group(sampling: SamplingParams) -> GroupRequest:
    """`some_requests` as one group."""
    return GroupRequest(Problem("p", (), "", "", ""), some_requests(), sampling)


def some_requests(prompts: int = 6, n: int = 4) -> list[GenerationRequest]:
    """`n` requests for each of several prompts of ragged lengths, two of which are equal."""
    ids = ragged_prompts(prompts)
    ids[-1] = ids[0]
    return [
        GenerationRequest(f"request-{index}/{sample}", prompt, seed=1000 * index + sample)
        for index, prompt in enumerate(ids)
        for sample in range(n)
    ]
