"""Validation of engine replies. No part of a reply is used before it has been checked here."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_fipo.engine.protocol import Generation, GenerationRequest, SamplingParams

HIGHEST_LOG_PROB = 1e-3
"""Log-probs are at most 0, except for the rounding of the engine's softmax."""


def malformed(
    reply: Any, requests: Sequence[GenerationRequest], sampling: SamplingParams, aborted: bool
) -> str | None:
    """What is wrong with a reply to `requests`, or None. With `aborted`, unfinished responses are allowed."""
    if not isinstance(reply, list) or len(reply) != len(requests):
        given = len(reply) if isinstance(reply, list) else type(reply).__name__
        return f"expected {len(requests)} generations, got {given}"
    for request, generation in zip(requests, reply, strict=True):
        problem = _malformed(generation, sampling.max_new_tokens - len(request.prefix), aborted)
        if problem is not None:
            return f"the response to request {request.request_id} {problem}"
    return None


def _malformed(generation: Any, limit: int, aborted: bool) -> str | None:
    if not isinstance(generation, Generation):
        return f"is a {type(generation).__name__}"
    unfinished = generation.finish_reason == "abort"
    if generation.finish_reason not in ("stop", "length") and not (unfinished and aborted):
        return f"has finish reason {generation.finish_reason!r}"
    if len(generation.response_ids) != len(generation.log_probs):
        return f"has {len(generation.log_probs)} log-probs for {len(generation.response_ids)} tokens"
    if not generation.response_ids:
        return None if unfinished else "is empty"
    if len(generation.response_ids) > limit:
        return f"has {len(generation.response_ids)} tokens, more than the {limit} allowed"
    try:
        ids, log_probs = np.asarray(generation.response_ids), np.asarray(generation.log_probs)
    except (ValueError, OverflowError):
        return "contains values that are not numbers"
    if ids.dtype.kind != "i" or ids.min() < 0:
        return "contains invalid token ids"
    if log_probs.dtype.kind != "f" or not np.isfinite(log_probs).all() or log_probs.max() > HIGHEST_LOG_PROB:
        return "has log-probs that are NaN, infinite or > 0"
    return None
