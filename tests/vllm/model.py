"""A random Qwen2 model large enough for vLLM's CPU kernels, and its log-probs by `transformers`."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_fipo.engine.protocol import Generation, GenerationRequest, SamplingParams
from tests.generations import ids
from tests.tiny_qwen2 import ragged_prompts, save_qwen2

TOKENIZER = Path(__file__).parents[2] / "examples/countdown/base-model"
MAX_MODEL_LEN = 200
PLAIN = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=40)


def save_model(folder: Path, seed: int) -> Path:
    """Tied embeddings, grouped queries, biases; sharp enough that tokens differ in likelihood."""
    save_qwen2(
        folder,
        seed,
        hidden_size=128,
        intermediate_size=192,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.08,
    )
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def some_requests(count: int = 8, seed: int = 1000) -> list[GenerationRequest]:
    return [
        GenerationRequest(f"request-{index}", prompt, seed + index)
        for index, prompt in enumerate(ragged_prompts(count))
    ]


def teacher_forced(
    folder: Path, request: GenerationRequest, generation: Generation, temperature: float
) -> torch.Tensor:
    """Log-probs [n] of the generated tokens in one pass over the complete sequence."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.tensor(ids(generation))
    with torch.no_grad():
        logits = model(torch.tensor([[*request.prompt_ids, *request.prefix, *ids(generation)]])).logits[0]
    rows = logits[-len(tokens) - 1 : -1] / temperature
    return torch.log_softmax(rows, -1).gather(-1, tokens[:, None])[:, 0]


def largest_difference(
    folder: Path, requests: list[GenerationRequest], generations: list[Generation], temperature: float
) -> float:
    """Between the engine's log-probs and the teacher-forced ones."""
    return max(
        float(
            (torch.tensor(generation.log_probs) - teacher_forced(folder, request, generation, temperature))
            .abs()
            .max()
        )
        for request, generation in zip(requests, generations, strict=True)
        if len(generation.response_ids)
    )
