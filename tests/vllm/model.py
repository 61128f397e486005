"""A random Qwen2 model that vLLM's kernels for CPUs support, and its log-probs from `transformers`."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from megatron_fipo.engine.protocol import Generation, GenerationRequest

TOKENIZER = Path(__file__).parents[2] / "examples/countdown/base-model"
END = 1
MAX_MODEL_LEN = 200


def save_model(folder: Path, seed: int) -> Path:
    """Tied embeddings, grouped queries, biases; sharp enough that tokens differ in probability."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=32,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=192,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.08,
        eos_token_id=END,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def some_requests(count: int = 8, seed: int = 1000) -> list[GenerationRequest]:
    prompts = [
        tuple(2 + (7 * index + 3 * position) % 30 for position in range(3 + index % 4))
        for index in range(count)
    ]
    return [
        GenerationRequest(f"request-{index}", prompt, seed + index) for index, prompt in enumerate(prompts)
    ]


def teacher_forced(
    folder: Path, request: GenerationRequest, generation: Generation, temperature: float
) -> torch.Tensor:
    """Log-probs [n] of the generated tokens in one pass over the full sequence."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.tensor(generation.response_ids)
    with torch.no_grad():
        logits = model(
            torch.tensor([[*request.prompt_ids, *request.prefix, *generation.response_ids]])
        ).logits[0]
    rows = logits[-len(tokens) - 1 : -1] / temperature
    return torch.log_softmax(rows, -1).gather(-1, tokens[:, None])[:, 0]


def largest_difference(
    folder: Path, requests: list[GenerationRequest], generations: list[Generation], temperature: float
) -> float:
    """Largest absolute difference between the engine's log-probs and teacher-forced ones."""
    return max(
        float(
            (torch.tensor(generation.log_probs) - teacher_forced(folder, request, generation, temperature))
            .abs()
            .max()
        )
        for request, generation in zip(requests, generations, strict=True)
        if generation.response_ids
    )
