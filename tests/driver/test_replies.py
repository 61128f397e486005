"""Which replies of an engine are valid."""

from dataclasses import replace

import pytest

from megatron_fipo.driver.rollout.replies import malformed
from megatron_fipo.engine.protocol import Generation, GenerationRequest, SamplingParams

SAMPLING = SamplingParams(1.0, 1.0, 4)
REQUESTS = [GenerationRequest("a", (1,), 0), GenerationRequest("b", (1,), 0, prefix=(7, 8))]
GOOD = [Generation((3, 4, 5, 6), (-0.5, -1.0, -2.0, 0.0), "length", 1), Generation((2,), (1e-7,), "stop", 1)]


def problem(reply, aborted: bool = False) -> str | None:
    return malformed(reply, REQUESTS, SAMPLING, aborted)


def test_a_good_reply_passes():
    assert problem(GOOD) is None
    assert malformed([Generation((), (), "abort", 1), GOOD[1]], REQUESTS, SAMPLING, aborted=True) is None
    assert (
        malformed([replace(GOOD[0], finish_reason="abort"), GOOD[1]], REQUESTS, SAMPLING, aborted=True)
        is None
    )


@pytest.mark.parametrize("reply", [None, "text", GOOD[:1], [*GOOD, GOOD[0]], tuple(GOOD), [GOOD, GOOD]])
def test_another_shape_does_not(reply):
    assert problem(reply) is not None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"response_ids": (3, 4)}, "1 log-probs for 2 tokens"),
        ({"response_ids": (), "log_probs": ()}, "is empty"),
        ({"response_ids": (1, 2, 3), "log_probs": (-1.0, -1.0, -1.0)}, "3 tokens, more than the 2 allowed"),
        ({"response_ids": (-1,)}, "contains invalid token ids"),
        ({"response_ids": (1.5,)}, "contains invalid token ids"),
        ({"response_ids": (True,)}, "contains invalid token ids"),
        ({"response_ids": ("x",)}, "contains invalid token ids"),
        ({"response_ids": (2**70,)}, "contains invalid token ids"),
        ({"response_ids": ((1, 2), 3), "log_probs": (-1.0, -1.0)}, "contains values that are not numbers"),
        ({"log_probs": (float("nan"),)}, "log-probs that are NaN, infinite or > 0"),
        ({"log_probs": (float("-inf"),)}, "log-probs that are NaN, infinite or > 0"),
        ({"log_probs": (0.1,)}, "log-probs that are NaN, infinite or > 0"),
        ({"log_probs": (None,)}, "log-probs that are NaN, infinite or > 0"),
        ({"finish_reason": "tired"}, "reason 'tired'"),
        ({"finish_reason": "abort"}, "reason 'abort'"),
    ],
)
def test_what_cannot_be_is_named(changes, sentence):
    found = problem([GOOD[0], replace(GOOD[1], **changes)])
    assert found is not None
    assert sentence in found
    assert "request b" in found
