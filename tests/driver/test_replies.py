"""Which replies of an engine are valid."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_fipo.driver.rollout.replies import malformed, malformed_status
from megatron_fipo.engine.protocol import EngineStatus, Generation, GenerationRequest, SamplingParams
from tests.generations import generation

SAMPLING = SamplingParams(1.0, 1.0, 4)
VOCABULARY = 9
REQUESTS = [
    GenerationRequest("a", (1,), 0),
    GenerationRequest("b", (1,), 0, prefix=np.array([7, 8], dtype=np.int32)),
]
GOOD = [generation((3, 4, 8, 0), (-0.5, -1.0, -2.0, 0.0), "length", 1), generation((2,), (1e-7,), "stop", 1)]


def tokens(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def log_probs(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def problem(reply, aborted: bool = False) -> str | None:
    return malformed(reply, REQUESTS, SAMPLING, VOCABULARY, aborted, (4, 2))


def test_a_good_reply_passes():
    assert problem(GOOD) is None
    assert problem([Generation.not_started(1), GOOD[1]], aborted=True) is None
    assert problem([replace(GOOD[0], finish_reason="abort"), GOOD[1]], aborted=True) is None
    assert problem([GOOD[0], replace(GOOD[1], routes=np.zeros((3, 4, 2), np.uint8))]) is None


class Raising(Generation):
    """Raises when it is read."""

    def __getattribute__(self, name: str) -> object:
        raise RuntimeError(name)


def test_objects_that_raise_when_they_are_read_do_not():
    for unreadable, words in (
        (Raising.__new__(Raising), "is a Raising, not a Generation"),
        (Generation.__new__(Generation), "has no response_ids"),
    ):
        assert problem([GOOD[0], unreadable]) == f"the response to request b {words}"


@pytest.mark.parametrize("reply", [None, "text", GOOD[:1], [*GOOD, GOOD[0]], tuple(GOOD), [GOOD, GOOD]])
def test_another_shape_does_not(reply):
    assert problem(reply) is not None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"response_ids": tokens(3, 4)}, "1 log-probs for 2 tokens"),
        ({"response_ids": tokens(), "log_probs": log_probs()}, "is empty"),
        (
            {"response_ids": tokens(1, 2, 3), "log_probs": log_probs(-1, -1, -1)},
            "3 tokens, more than the 2 allowed",
        ),
        ({"response_ids": tokens(-1)}, "the token id -1, outside the vocabulary of 9"),
        ({"response_ids": tokens(9)}, "the token id 9, outside the vocabulary of 9"),
        ({"response_ids": (1,)}, "token ids that are a tuple, not an array"),
        ({"response_ids": np.array([1.5])}, r"token ids that are float64 [1], not int32 [tokens]"),
        ({"response_ids": np.array([True])}, "token ids that are bool [1]"),
        ({"response_ids": np.array(["x"])}, "token ids that are <U1 [1]"),
        ({"response_ids": np.array([2**40])}, "token ids that are int64 [1]"),
        ({"response_ids": np.array(3, dtype=np.int32)}, "token ids that are int32 []"),
        ({"response_ids": tokens(1, 2)[None], "log_probs": log_probs(-1)}, "token ids that are int32 [1, 2]"),
        ({"log_probs": log_probs(float("nan"))}, "log-probs that are NaN, infinite or > 0"),
        ({"log_probs": log_probs(float("-inf"))}, "log-probs that are NaN, infinite or > 0"),
        ({"log_probs": log_probs(0.1)}, "log-probs that are NaN, infinite or > 0"),
        ({"log_probs": None}, "log-probs that are a NoneType, not an array"),
        ({"log_probs": np.array([None])}, "log-probs that are object [1], not float32 [tokens]"),
        ({"log_probs": np.array([-1.0], dtype=">f4")}, "log-probs that are >f4 [1], not float32 [tokens]"),
        ({"response_ids": np.ma.array(tokens(1), mask=[True])}, "token ids that are a MaskedArray"),
        ({"finish_reason": "tired"}, "reason 'tired'"),
        ({"finish_reason": np.array(["stop", "stop"])}, "a finish reason that is a ndarray"),
        ({"finish_reason": None}, "a finish reason that is a NoneType"),
        ({"weight_version": [1]}, "a weight version that is a list"),
        ({"weight_version": None}, "a weight version that is a NoneType"),
        ({"weight_version": 1.0}, "a weight version that is a float"),
        ({"finish_reason": "abort"}, "reason 'abort'"),
        ({"routes": [[1]]}, "has routes that are not an array"),
        ({"routes": np.zeros((3, 2), np.uint8)}, "has routes of the shape [3, 2], not [tokens, 4 layers, 2"),
        ({"routes": np.zeros((3, 1, 2), np.uint8)}, "has routes of the shape [3, 1, 2]"),
        ({"routes": np.zeros((3, 4, 1), np.uint8)}, "has routes of the shape [3, 4, 1]"),
        ({"routes": np.zeros((3, 4, 2), np.int64)}, "has routes that are not an array"),
        ({"routes": np.zeros((4, 4, 2), np.uint8)}, "has routes of 4 tokens, but 3 were computed"),
    ],
)
def test_what_cannot_be_is_named(changes, sentence):
    found = problem([GOOD[0], replace(GOOD[1], **changes)])
    assert found is not None
    assert sentence in found
    assert "request b" in found


def test_a_status_has_numbers():
    assert malformed_status(EngineStatus(-1, 0)) is None
    assert malformed_status(EngineStatus(1, np.int64(5), kv_tokens=7, kv_use=0.5, preemptions=1)) is None
    for status, words in (
        (None, "a NoneType, not an EngineStatus"),
        ({"tokens": 1}, "a dict, not an EngineStatus"),
        (EngineStatus(1, None), "tokens that is a NoneType"),  # type: ignore[arg-type]
        (EngineStatus(1, 5, waiting="3"), "waiting that is a str"),  # type: ignore[arg-type]
        (EngineStatus(1, 5, kv_use=float("nan")), "kv_use that is a float or not finite"),
    ):
        assert words in str(malformed_status(status))


def test_a_model_without_experts_has_no_routes():
    reply = [GOOD[0], replace(GOOD[1], routes=np.zeros((3, 4, 2), np.uint8))]
    found = malformed(reply, REQUESTS, SAMPLING, VOCABULARY, aborted=False)
    assert found == "the response to request b has routes, but the model has no experts"
