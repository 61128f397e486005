"""Responses grow over several calls bit for bit, and a finished group is scored."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.batching.trajectory import VersionSpan
from megatron_fipo.driver.rollout.prompt_group import (
    PromptGroup,
    Response,
    parse_request_id,
    request_seed,
)
from megatron_fipo.tasks.task import Problem
from tests.driver.toy_pool import RIGHT
from tests.generations import generation

PROBLEM = Problem("p", (3, 4), "prompt", "x", "test")


def response(*calls: tuple[int, int, str]) -> Response:
    """From (tokens, version, finish reason) of each call."""
    grown = Response()
    for count, version, reason in calls:
        grown.add(generation((9,) * count, (-0.5,) * count, reason, version))
    return grown


def test_spans_of_calls_with_the_same_weights_are_joined():
    grown = response((0, 1, "abort"), (3, 1, "abort"), (2, 1, "abort"), (0, 2, "abort"), (4, 3, "abort"))
    assert grown.spans == [VersionSpan(1, 0, 5), VersionSpan(3, 5, 9)]
    assert grown.finish_reason is None
    grown.add(generation((RIGHT,), (-0.1,), "stop", 3))
    assert grown.spans[-1] == VersionSpan(3, 5, 10)
    assert grown.finish_reason == "stop"


def test_a_group_is_as_old_as_its_oldest_token_and_asks_for_what_is_missing():
    group = PromptGroup(7, PROBLEM, [response(), response((2, 5, "abort")), response((3, 6, "stop"))])
    assert (group.oldest_version, group.tokens, group.finished) == (5, 5, False)
    first, second = group.requests(seed=1)
    assert (first.request_id, first.prefix.tolist()) == ("7-p/0", [])
    assert (second.request_id, second.prefix.tolist()) == ("7-p/1", [9, 9])
    assert PromptGroup(7, PROBLEM, [response()]).oldest_version is None


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**9), st.text(max_size=20), st.integers(0, 99))
def test_a_request_is_found_again_whatever_the_problem_is_called(serial, name, index):
    group = PromptGroup(serial, Problem(name, (1,), "", "", ""), [Response() for _ in range(index + 1)])
    assert parse_request_id(group.requests(seed=0)[-1].request_id) == (serial, index)


def test_seeds_differ_between_requests_and_repeat_between_runs():
    def seeds(seed: int, serial: int) -> list[int]:
        group = PromptGroup(serial, PROBLEM, [Response() for _ in range(4)])
        return [request.seed for request in group.requests(seed)]

    assert seeds(1, 0) == seeds(1, 0) == [request_seed(1, f"0-p/{index}") for index in range(4)]
    assert len({*seeds(1, 0), *seeds(1, 1), *seeds(2, 0)}) == 12
    assert all(0 <= seed < 2**63 for seed in seeds(1, 0))


def test_the_tokens_of_one_call_are_not_copied():
    """They stay in the object store."""
    answer = generation((9, 9), (-0.1, -0.2), "stop", 6)
    one_call = Response()
    one_call.add(answer)
    assert one_call.token_ids is answer.response_ids
    assert one_call.log_probs is answer.log_probs


def test_a_finished_group_is_scored_under_its_serial_and_an_unfinished_one_never():
    group = PromptGroup(7, PROBLEM, [response((2, 5, "stop")), response((3, 6, "length"))])
    request = group.score_request()
    assert (request.key, request.problem) == (7, PROBLEM)
    assert [(r.token_ids.tolist(), r.finish_reason) for r in request.responses] == [
        ([9, 9], "stop"),
        ([9, 9, 9], "length"),
    ]
    with pytest.raises(ValueError, match="unfinished"):
        PromptGroup(0, PROBLEM, [response((2, 1, "abort"))]).score_request()
