"""What an engine's reply has to look like. Nothing else of a reply is believed before it has been checked here."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_fipo.engine.protocol import Generation, GenerationRequest, SamplingParams

HIGHEST_LOG_PROB = 1e-3
"""Log-probs are at most 0, but for the rounding of the engine's softmax."""


def malformed(
    reply: Any, requests: Sequence[GenerationRequest], sampling: SamplingParams, aborted: bool
) -> str | None:
    """What is wrong with the form of a reply, or None. `aborted`: unfinished responses were asked for."""
    if not isinstance(reply, list) or len(reply) != len(requests):
        return f"{len(requests)} generations were due, not {f'{len(reply)}' if isinstance(reply, list) else type(reply).__name__}"
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
        return f"ended with the reason {generation.finish_reason!r}"
    if len(generation.response_ids) != len(generation.log_probs):
        return f"has {len(generation.log_probs)} log-probabilities for {len(generation.response_ids)} tokens"
    if not generation.response_ids:
        return None if unfinished else "is empty"
    if len(generation.response_ids) > limit:
        return f"has {len(generation.response_ids)} tokens where {limit} were left"
    try:
        ids, log_probs = np.asarray(generation.response_ids), np.asarray(generation.log_probs)
    except (ValueError, OverflowError):
        return "holds something else than numbers"
    if ids.dtype.kind != "i" or ids.min() < 0:
        return "has tokens that are no ids"
    if log_probs.dtype.kind != "f" or not np.isfinite(log_probs).all() or log_probs.max() > HIGHEST_LOG_PROB:
        return "has log-probabilities that are none"
    return None
