"""Groups of a checkpoint: their tokens as two arrays, everything else as JSON values.

    tokens     token_ids int32, log_probs float32: the arrays of all responses of all groups, one after another; and the
               numbers of their routes, if the engine reported them
    values     per group: serial, problem_id, responses, scores (null: not scored); per response: tokens, spans,
               finish_reason, observations and score (of an environment; versions before 0.2 have neither), and the shape
               of its routes if it has some

The arrays take 8 bytes per token without routes, and their reading and writing costs as much as the disk.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from math import prod
from typing import Any

import numpy as np

from megatron_fipo.batching.trajectory import VersionSpan, covers
from megatron_fipo.driver.rollout.prompt_group import PromptGroup, Response
from megatron_fipo.driver.rollout.replies import are_log_probs
from megatron_fipo.engine.protocol import NO_LOG_PROBS, NO_TOKENS
from megatron_fipo.scorer.result import UnusableResultError, plain_score
from megatron_fipo.tasks.task import Problem, Score

SavedGroup = tuple[PromptGroup, list[Score] | None]
"""A group, and the scores of its responses if it has any."""
TOKEN_IDS, LOG_PROBS, ROUTES = "token_ids", "log_probs", "routes"


def pack_groups(groups: Sequence[SavedGroup]) -> tuple[list[dict[str, Any]], dict[str, list[np.ndarray]]]:
    """JSON values and arrays of the groups. Problems are named, since they stay in the dataset."""
    values = [
        {
            "serial": group.serial,
            "problem_id": group.problem.problem_id,
            "responses": [
                {
                    "tokens": len(response.token_ids),
                    "spans": [asdict(span) for span in response.spans],
                    "finish_reason": response.finish_reason,
                    "observations": [list(observation) for observation in response.observations],
                    "score": None if response.score is None else asdict(response.score),
                    **({} if response.routes is None else {ROUTES: list(response.routes.shape)}),
                }
                for response in group.responses
            ],
            "scores": None if scores is None else [asdict(score) for score in scores],
        }
        for group, scores in groups
    ]
    responses = [response for group, _ in groups for response in group.responses]
    tokens = {
        TOKEN_IDS: [NO_TOKENS, *(response.token_ids for response in responses)],
        LOG_PROBS: [NO_LOG_PROBS, *(response.log_probs for response in responses)],
    }
    if routes := [response.routes.ravel() for response in responses if response.routes is not None]:
        tokens[ROUTES] = routes
    return values, tokens


def unpack_groups(
    values: Sequence[Mapping[str, Any]],
    tokens: Mapping[str, Sequence[np.ndarray]],
    problems: Mapping[str, Problem],
) -> list[SavedGroup]:
    """The inverse of `pack_groups`, with the problems by id.

    Also reads the values of versions before 0.2, which have no scores. Raises `ValueError`, `KeyError`, `TypeError`
    or `AttributeError` for values that `pack_groups` does not give.
    """
    columns = _columns(tokens)
    position = routed = 0
    groups = []
    for saved in values:
        responses = []
        for response in saved["responses"]:
            if "tokens" in response:
                part = slice(position, position + natural(response, "tokens"))
                ids, log_probs = columns[TOKEN_IDS][part], columns[LOG_PROBS][part]
                position = part.stop
                if position > len(columns[TOKEN_IDS]):
                    raise ValueError("the responses have more tokens than the columns")
            else:
                ids, log_probs = _old_columns(response)
            spans = [VersionSpan(**span) for span in response["spans"]]
            observations = tuple((start, end) for start, end in response.get("observations", ()))
            score = response.get("score")
            score = None if score is None else _score(score)
            routes, routed = _routes(response.get(ROUTES), columns[ROUTES], routed)
            responses.append(
                Response(ids, log_probs, spans, response["finish_reason"], observations, score, routes)
            )
        if saved["problem_id"] not in problems:
            raise ValueError(f"there is no problem {saved['problem_id']!r}")
        if not responses:
            raise ValueError(f"group {saved['serial']} has no responses")
        group = PromptGroup(natural(saved, "serial"), problems[saved["problem_id"]], responses)
        for index, loaded in enumerate(responses):
            if fault := _fault(loaded, len(group.problem.prompt_ids)):
                raise ValueError(f"response {index} of group {group.group_id} {fault}")
        groups.append((group, _scores(group, saved.get("scores"))))
    if position != len(columns[TOKEN_IDS]) or routed != len(columns[ROUTES]):
        raise ValueError("the responses have fewer tokens than the columns")
    return groups


def _routes(shape: Any, column: np.ndarray, position: int) -> tuple[np.ndarray | None, int]:
    """The routes of a response, from `position` in the column on, and where they end."""
    if shape is None:
        return None, position
    if not isinstance(shape, list) or len(shape) != 3 or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"routes have the shape {shape!r}")
    end = position + prod(shape)
    if end > len(column):
        raise ValueError("the responses have more routes than the column")
    return column[position:end].reshape(shape), end


def natural(values: Mapping[str, Any], name: str) -> int:
    """A number of at least 0. Raises `KeyError`, or `ValueError` if it is not one."""
    value = values[name]
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} is {value!r}, not a number of at least 0")
    return value


def _columns(tokens: Mapping[str, Sequence[np.ndarray]]) -> dict[str, np.ndarray]:
    """Token ids and log-probs, of one length; empty columns if there are none, as before version 0.2."""
    columns: dict[str, np.ndarray] = {
        TOKEN_IDS: NO_TOKENS,
        LOG_PROBS: NO_LOG_PROBS,
        ROUTES: np.zeros(0, np.uint8),
    }
    dtypes: dict[str, tuple[np.dtype, ...]] = {name: (column.dtype,) for name, column in columns.items()}
    dtypes[ROUTES] = (np.dtype(np.uint8), np.dtype(np.uint16))
    for name, parts in tokens.items():
        column = np.concatenate(parts) if len(parts) > 1 else parts[0]
        if column.dtype not in dtypes.get(name, ()):
            raise ValueError(f"the column {name} has the dtype {column.dtype}")
        columns[name] = column
    if len(columns[TOKEN_IDS]) != len(columns[LOG_PROBS]):
        raise ValueError("the columns differ in length")
    return columns


def _fault(response: Response, prompt: int) -> str | None:
    """What no response to a prompt of that many tokens has, or None."""
    length = len(response.token_ids)
    if response.routes is not None and len(response.routes) >= max(prompt + length, 1):
        return f"has routes of {len(response.routes)} tokens, but {prompt + length - 1} were computed"
    if len(response.log_probs) != length:
        return "has log-probs whose number differs from its tokens"
    if length and response.token_ids.min() < 0:
        return "has a negative token id"
    if not are_log_probs(response.log_probs):
        return "has log-probs that are NaN, infinite or > 0"
    if response.finish_reason not in ("stop", "length", None):
        return f"has finish reason {response.finish_reason!r}"
    if not covers(response.spans, length) or any(type(span.version) is not int for span in response.spans):
        return "has weight versions that do not cover its tokens"
    ends = [0]
    for start, end in response.observations:
        if type(start) is not int or type(end) is not int or not ends[-1] < start < end <= length:
            return (
                f"has observations at {list(response.observations)}, which do not follow tokens of the policy"
            )
        ends.append(end)
    if response.finish_reason is not None and length == ends[-1] > 0:
        return "is finished after an observation"
    if response.finish_reason is None and response.score is not None:
        return "has a score and is unfinished"
    return None


def _scores(group: PromptGroup, values: Any) -> list[Score] | None:
    if values is None:
        return None
    if not group.finished or len(values) != len(group.responses):
        raise ValueError(
            f"group {group.group_id} has {len(values)} scores for {len(group.responses)} responses, or is unfinished"
        )
    return [_score(score) for score in values]


def _score(values: Mapping[str, Any]) -> Score:
    try:
        return plain_score(Score(**{field.name: values[field.name] for field in fields(Score)}))
    except UnusableResultError as error:
        raise ValueError(f"a score {error}") from error


def _old_columns(response: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Before version 0.2 the arrays were base64 in the JSON file, log-probs as float64 of float32 values."""
    ids = np.frombuffer(base64.b64decode(response[TOKEN_IDS]), dtype="<i4")
    log_probs = np.frombuffer(base64.b64decode(response[LOG_PROBS]), dtype="<f8")
    return ids.astype(np.int32), log_probs.astype(np.float32)
