"""A scored group becomes trajectories: tokens and versions of sampling, reward of scoring and length."""

import numpy as np

from megatron_fipo.batching.trajectory import Trajectory, VersionSpan
from megatron_fipo.driver.rollout.prompt_group import PromptGroup, Response
from megatron_fipo.driver.rollout.trajectories import Overlong, trajectories
from megatron_fipo.tasks.task import Problem, Score, TaskSettings
from tests.generations import generation, plain


def response(length: int, reason: str, *spans: VersionSpan) -> Response:
    tokens = generation(range(length), [-0.1 * (token + 1) for token in range(length)], reason, 7)
    return Response(tokens.response_ids, tokens.log_probs, list(spans), reason)


def test_a_trajectory_carries_what_sampling_and_scoring_learnt():
    spans = VersionSpan(6, 0, 2), VersionSpan(7, 2, 3)
    responses = [response(3, "stop", *spans), response(6, "stop"), response(8, "length")]
    scores = [Score(1.0, 1.0, "34", {"steps": 3}), Score(1.0, 1.0, "34"), Score(-1.0, 0.0, "35")]
    group = PromptGroup(2, Problem("p", (3, 4), "prompt", "34", "test"), responses)
    short, long, cut = trajectories(group, scores, Overlong(8, buffer=4, factor=1.0))
    assert (short.reward, long.reward, cut.reward) == (1.0, 0.5, -2.0)
    assert (short.accuracy, long.accuracy, cut.accuracy) == (1.0, 1.0, 0.0)
    assert plain(short) == plain(
        Trajectory(
            group_id="2-p",
            prompt_ids=np.int32([3, 4]),
            response_ids=np.int32([0, 1, 2]),
            response_mask=np.int8([1, 1, 1]),
            rollout_log_probs=np.float32([-0.1, -0.2, -0.3]),
            spans=list(spans),
            finish_reason="stop",
            reward=1.0,
            accuracy=1.0,
            advantage=0.0,
            extra={"problem_id": "p", "answer": "34", "steps": 3},
        )
    )
    assert short.response_ids is responses[0].token_ids
    assert cut.finish_reason == "length"


def test_the_penalty_begins_before_the_limit_of_the_set():
    of_set = Problem("s/p", (3, 4), "prompt", "34", "test", task=TaskSettings("s", max_response_length=6))
    group = PromptGroup(2, of_set, [response(2, "stop"), response(4, "stop"), response(6, "length")])
    scored = trajectories(group, [Score(0.0, 1.0)] * 3, Overlong(8, buffer=4, factor=1.0))
    assert [trajectory.reward for trajectory in scored] == [0.0, -0.5, -1.0]
    assert {trajectory.set_name for trajectory in scored} == {"s"}
