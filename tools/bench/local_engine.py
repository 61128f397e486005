"""Decoding by the local engine: a growing cache, fixed tensors, and fixed tensors with CUDA graphs, on one device, one after another.

    python -m tools.bench.local_engine [0.6M] [135M] [0.5B]                      # on a GPU
    TRITON_INTERPRET=1 python -m tools.bench.local_engine                        # toy sizes on a CPU: no graphs, no meaning

Random weights in bfloat16, 512 responses of 128 tokens to 32 prompts of 64. No row ends early. Prefill is included.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from megatron_fipo.engine.decoding.dynamic import DynamicDecoder
from megatron_fipo.engine.decoding.graphs import Graphs, Launches, free_bytes
from megatron_fipo.engine.decoding.rows import Counts, Decoder, Row
from megatron_fipo.engine.decoding.static import StaticDecoder
from megatron_fipo.engine.protocol import GenerationRequest, SamplingParams
from tests.gpu.policies import Shape
from tools.bench.harness import Bench, Case, Cases, heading, release, run_cases, synchronize
from tools.bench.report import FIGURE, aimed, duration, mebibytes
from tools.bench.report import Row as ReportRow

SECTION = "rollouts"
AIM_S = 3e-3
"""Per step with graphs."""


MODELS = {
    "0.6M": Shape(4, 128, 256, 4, 2, 32, tied=True),
    "135M": Shape(30, 576, 1_536, 9, 3, 49_152, tied=True),
    "0.5B": Shape(24, 896, 4_864, 14, 2, 151_936, tied=True),
}
TOY = Shape(2, 32, 48, 4, 2, 61, tied=True)


def new_model(shape: Shape, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A Llama of this shape with random weights, wide enough that no token is certain."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        tie_word_embeddings=shape.tied,
    )
    return LlamaForCausalLM(config).to(device, dtype).eval().requires_grad_(False)


def new_rows(shape: Shape, prompts: int, responses: int, prompt: int, limit: int) -> list[Row]:
    """Prompts of `prompt` to half as many tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(prompt // 2, prompt + 1, (prompts,), generator=generator).tolist()
    lengths[0] = prompt
    ids = [
        tuple(torch.randint(shape.vocabulary, (length,), generator=generator).tolist()) for length in lengths
    ]
    return [
        Row.of(GenerationRequest("", ids[index], seed=responses * index + sample), limit)
        for index in range(prompts)
        for sample in range(responses)
    ]


def append(running: Sequence[Row], tokens: Sequence[int], log_probs: Sequence[float]) -> list[int]:
    """As the engine does, without end tokens."""
    survivors = []
    for index, (row, token, log_prob) in enumerate(zip(running, tokens, log_probs, strict=True)):
        row.tokens.append(token)
        row.log_probs.append(log_prob)
        if len(row.tokens) == len(row.uniforms):
            row.finish_reason = "length"
        else:
            survivors.append(index)
    return survivors


def methods(bench: Bench, model: Any) -> Iterator[tuple[str, Decoder]]:
    """In this order: the fixed tensors bring an attention function of their own to the model."""

    def never() -> bool:
        return False

    yield "growing cache", DynamicDecoder(model, Counts(), never)
    yield "fixed tensors", StaticDecoder(model, Counts(), never, Launches())
    if bench.on_gpu:
        yield "fixed tensors and graphs", StaticDecoder(model, Counts(), never, Graphs(), free_bytes)


def measure(
    bench: Bench, decoder: Decoder, rows: Callable[[int], list[Row]], limit: int
) -> tuple[float, int, list[Row]]:
    """Seconds per step, bytes of device memory beyond the model's, and the rows. The first call, not timed, makes the graphs."""
    sampling = SamplingParams(1.0, 1.0, limit)
    decoder.decode(rows(limit), sampling, append)
    synchronize(bench)
    before = 0
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()
        decoder.release()
        before = torch.cuda.memory_allocated()
        decoder.decode(rows(limit), sampling, append)
        torch.cuda.synchronize()
    timed = rows(limit)
    start = time.perf_counter()
    decoder.decode(timed, sampling, append)
    synchronize(bench)
    seconds = (time.perf_counter() - start) / limit
    peak = torch.cuda.max_memory_allocated() - before if bench.on_gpu else 0
    decoder.release()
    return seconds, peak, timed


def case(name: str) -> Case:
    def run(bench: Bench) -> Iterator[ReportRow]:
        shape = bench.pick(MODELS[name], TOY)
        prompts, responses, prompt, limit = bench.pick((32, 16, 64, 128), (3, 4, 12, 20))
        model = new_model(shape, bench.device)
        print(heading(torch.cuda.get_device_name() if bench.on_gpu else "CPU, toy size"), flush=True)
        first = 0.0
        for method, decoder in methods(bench, model):
            seconds, peak, rows = measure(
                bench, decoder, lambda limit: new_rows(shape, prompts, responses, prompt, limit), limit
            )
            first = first or seconds
            figures: dict[str, float | str] = {
                "step_seconds": seconds,
                "tokens_per_second": len(rows) / seconds,
                "speed_against_growing_cache": first / seconds,
                "peak_bytes": float(peak),
            }
            result = (
                f"{duration(seconds)} per step, {len(rows) / seconds:,.0f} tokens/s, {first / seconds:.1f} x the growing cache, "
                f"{mebibytes(peak)}"
            )
            graphs = method.endswith("graphs")
            title = f"{name}, {len(rows)} rows, {method}" + (
                f" (aim <= {1e3 * AIM_S:.0f} ms)" if graphs else ""
            )
            yield ReportRow(SECTION, title, aimed(seconds <= AIM_S) if graphs else FIGURE, result, figures)
            del decoder
            release(bench)

    return run


CASES: Cases = {name: case(name) for name in MODELS}

if __name__ == "__main__":
    run_cases(__doc__, SECTION, CASES)
