"""Validation of engine replies. No part of a reply is used before it has been checked here."""

import math
from collections.abc import Sequence
from dataclasses import fields
from numbers import Real
from typing import Any

import numpy as np

from megatron_fipo.engine.protocol import (
    NO_LOG_PROBS,
    NO_TOKENS,
    EngineStatus,
    Generation,
    GenerationRequest,
    SamplingParams,
)

HIGHEST_LOG_PROB = 1e-3
"""Log-probs are at most 0, except for the rounding of the engine's softmax."""


def malformed(
    reply: Any,
    requests: Sequence[GenerationRequest],
    sampling: SamplingParams,
    vocab_size: int,
    aborted: bool,
    route_shape: tuple[int, int] | None = None,
) -> str | None:
    """What is wrong with a reply to `requests`, or None. With `aborted`, unfinished responses are allowed.

    `route_shape` is (layers, experts per token) of the model; None without experts.

    Types must be exact: a subclass may do anything when it is read, and a masked array hides values.
    """
    if type(reply) is not list or len(reply) != len(requests):
        given = len(reply) if type(reply) is list else type(reply).__name__
        return f"expected {len(requests)} generations, got {given}"
    for request, generation in zip(requests, reply, strict=True):
        problem = _malformed(generation, sampling.max_new_tokens - len(request.prefix), vocab_size, aborted)
        problem = problem or _malformed_routes(request, generation, route_shape)
        if problem is not None:
            return f"the response to request {request.request_id} {problem}"
    return None


def malformed_status(status: Any) -> str | None:
    """What is wrong with an answer to `ready` or `status`, or None."""
    if type(status) is not EngineStatus:
        return f"a {type(status).__name__}, not an EngineStatus"
    for field in fields(EngineStatus):
        value = vars(status).get(field.name)
        unknown = value is None and field.default is None
        if not unknown and not (isinstance(value, Real) and math.isfinite(value)):
            return f"{field.name} that is a {type(value).__name__} or not finite, not a number"
    return None


def outside_vocabulary(ids: np.ndarray, vocab_size: int) -> int | None:
    """The lowest of the ids (at least one) if it is negative, else the highest if it is too large, else None."""
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0:
        return lowest
    return highest if highest >= vocab_size else None


def are_log_probs(values: np.ndarray) -> bool:
    """Whether all are finite and at most `HIGHEST_LOG_PROB`."""
    return bool((np.isfinite(values) & (values <= HIGHEST_LOG_PROB)).all())


def _malformed(generation: Any, limit: int, vocab_size: int, aborted: bool) -> str | None:
    if type(generation) is not Generation:
        return f"is a {type(generation).__name__}, not a Generation"
    if missing := [field.name for field in fields(Generation) if field.name not in vars(generation)]:
        return f"has no {missing[0]}"
    if type(generation.finish_reason) is not str or type(generation.weight_version) is not int:
        return (
            f"has a finish reason that is a {type(generation.finish_reason).__name__} and a weight version that "
            f"is a {type(generation.weight_version).__name__}, not str and int"
        )
    unfinished = generation.finish_reason == "abort"
    if generation.finish_reason not in ("stop", "length") and not (unfinished and aborted):
        return f"has finish reason {generation.finish_reason[:20]!r}"
    ids, log_probs = generation.response_ids, generation.log_probs
    if fault := _not_a_column(ids, NO_TOKENS.dtype):
        return f"has token ids that are {fault}"
    if fault := _not_a_column(log_probs, NO_LOG_PROBS.dtype):
        return f"has log-probs that are {fault}"
    if len(ids) != len(log_probs):
        return f"has {len(log_probs)} log-probs for {len(ids)} tokens"
    if not len(ids):
        return None if unfinished else "is empty"
    if len(ids) > limit:
        return f"has {len(ids)} tokens, more than the {limit} allowed"
    if (invalid := outside_vocabulary(ids, vocab_size)) is not None:
        return f"has the token id {invalid}, outside the vocabulary of {vocab_size}"
    if not are_log_probs(log_probs):
        return "has log-probs that are NaN, infinite or > 0"
    return None


def _malformed_routes(
    request: GenerationRequest, generation: Generation, shape: tuple[int, int] | None
) -> str | None:
    routes = generation.routes
    if routes is None:
        return None
    if shape is None:
        return "has routes, but the model has no experts"
    if type(routes) is not np.ndarray or routes.dtype not in (np.uint8, np.uint16):
        return "has routes that are not an array of uint8 or uint16"
    if routes.ndim != 3 or routes.shape[1:] != shape:
        return (
            f"has routes of the shape {list(routes.shape)}, not [tokens, {shape[0]} layers, {shape[1]} experts "
            "per token]"
        )
    computed = len(request.prompt_ids) + len(request.prefix) + len(generation.response_ids) - 1
    if len(routes) > computed - request.routed:
        return f"has routes of {len(routes)} tokens, but {computed - request.routed} were computed"
    return None


def _not_a_column(values: Any, dtype: np.dtype) -> str | None:
    """How a value differs from an array of one dimension and this dtype; None if it is one."""
    if type(values) is not np.ndarray:
        return f"a {type(values).__name__}, not an array"
    if values.ndim != 1 or values.dtype != dtype:
        return f"{values.dtype} {list(values.shape)}, not {dtype} [tokens]"
    return None
