"""A request as vLLM's sampling parameters, and vLLM's output as a generation. vLLM is imported by the calls."""

import hashlib
from collections.abc import Set
from dataclasses import replace
from typing import Any

import numpy as np

from megatron_fipo.engine.protocol import Generation, GenerationRequest, SamplingParams
from megatron_fipo.engine.stop_strings import StopStrings
from megatron_fipo.engine.vllm_start import MIN_P, VLLMSettings


def sampling_of(
    request: GenerationRequest, sampling: SamplingParams, settings: VLLMSettings, end_ids: Set[int]
) -> Any:
    """`vllm.SamplingParams` of one request. Only `deterministic` engines get seeds: vLLM samples rows with a seed one by one."""
    from vllm import SamplingParams as VLLMSamplingParams
    from vllm.sampling_params import RequestOutputKind

    greedy = sampling.temperature == 0
    min_p = 0.0 if greedy else sampling.min_p
    return VLLMSamplingParams(
        temperature=1.0 if greedy else sampling.temperature,
        top_k=1 if greedy else sampling.top_k,
        top_p=1.0 if greedy else sampling.top_p,
        min_p=0.0 if settings.needs_processor else min_p,
        extra_args={MIN_P: min_p} if settings.needs_processor else None,
        max_tokens=sampling.max_new_tokens - len(request.prefix),
        seed=seed_of(request) if settings.deterministic else None,
        stop_token_ids=sorted(end_ids | set(sampling.stop_token_ids)),
        stop=list(sampling.stop),
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        spaces_between_special_tokens=False,
        logprobs=0,
        flat_logprobs=True,
        detokenize=bool(sampling.stop),
        output_kind=RequestOutputKind.FINAL_ONLY,
        routed_experts_prompt_start=request.routed,
    )


def seed_of(request: GenerationRequest) -> int:
    """63 bits. A continued response uses other random numbers than its first part."""
    digest = hashlib.sha256(f"{request.seed}|{len(request.prefix)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generation_of(output: Any, version: int) -> Generation:
    """Converts vLLM's `RequestOutput`."""
    response = output.outputs[0]
    tokens = np.array(response.token_ids, dtype=np.int32)
    log_probs = np.array(response.logprobs.logprobs if len(tokens) else (), dtype=np.float32)
    if response.finish_reason not in ("stop", "length", "abort"):
        raise RuntimeError(f"vLLM ended a request with {response.finish_reason!r}")
    return Generation(tokens, log_probs, response.finish_reason, version, response.routed_experts)


def ended_across(stop: StopStrings, request: GenerationRequest, generation: Generation) -> Generation:
    """The generation up to a stop string that begins in the request's prefix, which is a prompt for vLLM."""
    tokens = generation.response_ids
    end = stop.end_across(request.prefix.tolist(), tokens.tolist())
    if end is None:
        return generation
    computed = len(request.prompt_ids) + len(request.prefix) + end - 1 - request.routed
    return replace(
        generation,
        response_ids=tokens[:end],
        log_probs=generation.log_probs[:end],
        finish_reason="stop",
        routes=None if generation.routes is None else generation.routes[:computed],
    )
