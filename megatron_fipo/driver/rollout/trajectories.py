"""A scored group as the trajectories that are trained on. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_fipo.batching.trajectory import Trajectory
from megatron_fipo.driver.rollout.prompt_group import PromptGroup
from megatron_fipo.objective.advantages import overlong_penalty
from megatron_fipo.tasks.task import Score

ScoredGroup = list[Trajectory]
"""The scored responses to one prompt, in the order of their indices."""


@dataclass(frozen=True)
class Overlong:
    """The penalty of responses near the limit; lengths in tokens."""

    max_response_length: int
    """Of problems whose set has no limit of its own."""
    buffer: int
    """Over the last `buffer` tokens the penalty grows from 0; 0 for no penalty."""
    factor: float
    """The penalty at the limit."""


def trajectories(group: PromptGroup, scores: Sequence[Score], overlong: Overlong) -> ScoredGroup:
    """The responses with their scores, one each. Arrays are those of the group, uncopied.

    `reward` is the score's plus the overlong penalty, which counts all tokens of a response, as the limit does;
    `accuracy` is the score's own.
    """
    problem = group.problem
    prompt_ids = np.array(problem.prompt_ids, dtype=np.int32)
    limit = problem.task.max_response_length or overlong.max_response_length
    scored = []
    for response, score in zip(group.responses, scores, strict=True):
        assert response.finish_reason is not None
        length = len(response.token_ids)
        penalty = overlong_penalty(length, limit, overlong.buffer, overlong.factor)
        scored.append(
            Trajectory(
                group_id=group.group_id,
                prompt_ids=prompt_ids,
                response_ids=response.token_ids,
                response_mask=response.mask,
                rollout_log_probs=response.log_probs,
                routes=response.routes,
                spans=response.spans,
                finish_reason=response.finish_reason,
                reward=score.reward + float(penalty),
                accuracy=score.accuracy,
                set_name=problem.task.set_name,
                extra={"problem_id": problem.problem_id, "answer": score.answer, **score.extra},
            )
        )
    return scored
