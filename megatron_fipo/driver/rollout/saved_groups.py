"""Groups of a checkpoint: their tokens as two arrays, everything else as JSON values.

    tokens     token_ids int32, log_probs float32: the arrays of all responses of all groups, one after another
    values     per group: serial, problem_id, responses, scores (null: not scored); per response: tokens, spans,
               finish_reason

The arrays take 8 bytes per token, and their reading and writing costs as much as the disk.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from megatron_fipo.batching.trajectory import VersionSpan
from megatron_fipo.driver.rollout.prompt_group import PromptGroup, Response
from megatron_fipo.engine.protocol import NO_LOG_PROBS, NO_TOKENS
from megatron_fipo.tasks.task import Problem, Score

SavedGroup = tuple[PromptGroup, list[Score] | None]
"""A group, and the scores of its responses if it has any."""
TOKEN_IDS, LOG_PROBS = "token_ids", "log_probs"


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
    return values, tokens


def unpack_groups(
    values: Sequence[Mapping[str, Any]],
    tokens: Mapping[str, Sequence[np.ndarray]],
    problems: Mapping[str, Problem],
) -> list[SavedGroup]:
    """The inverse of `pack_groups`, with the problems by id.

    Also reads the values of versions before 0.2, which have no scores.
    """
    columns = {name: np.concatenate(parts) if len(parts) > 1 else parts[0] for name, parts in tokens.items()}
    position = 0
    groups = []
    for saved in values:
        responses = []
        for response in saved["responses"]:
            if "tokens" in response:
                part = slice(position, position + response["tokens"])
                ids, log_probs = columns[TOKEN_IDS][part], columns[LOG_PROBS][part]
                position = part.stop
            else:
                ids, log_probs = _old_columns(response)
            spans = [VersionSpan(**span) for span in response["spans"]]
            responses.append(Response(ids, log_probs, spans, response["finish_reason"]))
        scores = saved.get("scores")
        groups.append(
            (
                PromptGroup(saved["serial"], problems[saved["problem_id"]], responses),
                None if scores is None else [Score(**score) for score in scores],
            )
        )
    return groups


def _old_columns(response: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Before version 0.2 the arrays were base64 in the JSON file, log-probs as float64 of float32 values."""
    ids = np.frombuffer(base64.b64decode(response[TOKEN_IDS]), dtype="<i4")
    log_probs = np.frombuffer(base64.b64decode(response[LOG_PROBS]), dtype="<f8")
    return ids.astype(np.int32), log_probs.astype(np.float32)
