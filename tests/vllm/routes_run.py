"""Run by test_routes.py as a process: an engine that reports routes, and what it answers, as JSON lines on standard output.

python routes_run.py FOLDER OTHER_FOLDER
"""

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from megatron_fipo.engine.protocol import Generation, GenerationRequest, SamplingParams
from megatron_fipo.engine.vllm_engine import VLLMEngine

SAMPLING = SamplingParams(temperature=0.001, top_p=1.0, max_new_tokens=12)
"""Almost greedy, so that every run compares the same tokens. vLLM's kernel for greedy sampling does not run in the interpreter."""
LENGTHS = (135, 3, 30, 120, 126)
"""Of prompts. A block of vLLM's cache has 128 tokens, so the last two need a second block during their response."""
CACHE = {"kv_cache_memory_bytes": 7 * 128 * 3 * 2 * 2 * 32 * 4}
"""7 blocks, fewer than these requests need together: one of them is preempted."""
CHUNKS = {"enable_chunked_prefill": True, "max_num_batched_tokens": 64, "max_num_seqs": 16}
"""Prompts are computed in several steps."""


def requests(tag: str) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            f"{tag}-{length}", tuple(2 + (7 * length + 3 * place) % 30 for place in range(length)), 0
        )
        for length in LENGTHS
    ]


def show(event: str, sent: Sequence[GenerationRequest], generations: Sequence[Generation]) -> None:
    for request, generation in zip(sent, generations, strict=True):
        routes = generation.routes
        record: dict[str, Any] = {
            "event": event,
            "context": [*request.prompt_ids, *request.prefix.tolist()],
            "routed": request.routed,
            "response": generation.response_ids.tolist(),
            "log_probs": generation.log_probs.tolist(),
            "finish_reason": generation.finish_reason,
            "routes": None if routes is None else routes.tolist(),
            "dtype": None if routes is None else str(routes.dtype),
        }
        print(json.dumps(record), flush=True)


async def main(folder: str, other: str) -> None:
    engine = VLLMEngine(folder, "float32", max_model_len=200, routes=True, arguments=CACHE | CHUNKS)
    await engine.ready()
    for event in ("first", "cached"):
        sent = requests(event)
        show(event, sent, await engine.generate(sent, SAMPLING))

    endless = replace(SAMPLING, max_new_tokens=60)
    sent = requests("aborted")
    call = asyncio.create_task(engine.generate(sent, endless))
    await engine.generate(requests("clock")[:1], replace(SAMPLING, max_new_tokens=4))
    await engine.abort()
    parts = await call
    show("aborted", sent, parts)
    rest = [
        replace(
            request,
            prefix=part.response_ids,
            routed=len(request.prompt_ids) + len(part.response_ids) - 1 if len(part.response_ids) else 0,
        )
        for request, part in zip(sent, parts, strict=True)
        if part.finish_reason == "abort"
    ]
    show("continued", rest, await engine.generate(rest, endless))
    status = await engine.status()
    print(json.dumps({"event": "status", "preemptions": status.preemptions, "hits": status.prefix_hits}))

    call = asyncio.create_task(engine.generate(sent, SAMPLING))
    await asyncio.sleep(0)
    await engine.begin_weight_update(check=True)
    show("never started", sent, await call)
    await engine.load_weights(load_file(Path(other) / "model.safetensors"))
    await engine.finish_weight_update(1)
    sent = requests("pushed")
    show("pushed", sent, await engine.generate(sent, SAMPLING))
    engine._llm.shutdown()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
