"""Groups of a checkpoint keep every bit, and those of earlier versions are read."""

import base64
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.batching.trajectory import VersionSpan
from megatron_fipo.driver.rollout.prompt_group import PromptGroup, Response
from megatron_fipo.driver.rollout.saved_groups import pack_groups, unpack_groups
from megatron_fipo.run_dir.loop_state import (
    TOKENS_FILE,
    LoopState,
    RolloutState,
    read_loop_state,
    write_loop_state,
)
from megatron_fipo.tasks.task import Problem, Score
from tests.generations import generation, plain

PROBLEMS = {name: Problem(name, (3, 4), "prompt", "x", "test") for name in ("p", "q")}


@st.composite
def responses(draw) -> Response:
    grown = Response()
    for version in range(draw(st.integers(0, 3))):
        tokens = draw(
            st.lists(st.tuples(st.integers(0, 2**31 - 1), st.floats(-100, 0, width=32)), max_size=5)
        )
        reason = draw(st.sampled_from(["stop", "length", "abort"]))
        grown.add(generation([t for t, _ in tokens], [p for _, p in tokens], reason, version))
    return grown


scores = st.builds(
    Score,
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, 1.0]),
    st.text(),
    st.dictionaries(st.text(), st.floats(allow_nan=False) | st.lists(st.text())),
)
groups = st.tuples(
    st.builds(
        PromptGroup,
        st.integers(0, 10**6),
        st.sampled_from(list(PROBLEMS.values())),
        st.lists(responses(), max_size=4),
    ),
    st.none() | st.lists(scores, max_size=4),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(groups, max_size=4))
def test_groups_survive_a_checkpoint_to_the_bit(tmp_path_factory, saved):
    folder = tmp_path_factory.mktemp("checkpoint")
    values, tokens = pack_groups(saved)
    write_loop_state(folder, LoopState(3, 4, RolloutState({"groups": values}, tokens)))
    state = read_loop_state(folder)
    assert (state.iteration, state.weight_version) == (3, 4)
    restored = unpack_groups(state.rollout.values["groups"], state.rollout.tokens, PROBLEMS)
    assert plain(restored) == plain(saved)


def test_groups_of_earlier_versions_are_read():
    """The values as version 0.1 wrote them: base64 of int32 and float64."""
    log_probs = np.float32([-0.1, -1e-7, -30.0])
    old = {
        "serial": 7,
        "problem_id": "q",
        "responses": [
            {
                "token_ids": base64.b64encode(np.array([1, 2, 2**31 - 1], "<i4").tobytes()).decode(),
                "log_probs": base64.b64encode(log_probs.astype("<f8").tobytes()).decode(),
                "spans": [{"version": 2, "start": 0, "end": 3}],
                "finish_reason": "stop",
            },
            {"token_ids": "", "log_probs": "", "spans": [], "finish_reason": None},
        ],
    }
    done = Response(np.int32([1, 2, 2**31 - 1]), log_probs, [VersionSpan(2, 0, 3)], "stop")
    expected = [(PromptGroup(7, PROBLEMS["q"], [done, Response()]), None)]
    assert plain(unpack_groups(json.loads(json.dumps([old])), {}, PROBLEMS)) == plain(expected)


def test_a_damaged_file_of_tokens_is_a_value_error(tmp_path):
    done = Response(np.int32([1, 2, 3]), np.float32([-1, -2, -3]), [VersionSpan(2, 0, 3)], "stop")
    values, tokens = pack_groups([(PromptGroup(7, PROBLEMS["q"], [done]), None)])
    write_loop_state(tmp_path, LoopState(1, 1, RolloutState({"groups": values}, tokens)))
    path = tmp_path / TOKENS_FILE
    intact = path.read_bytes()
    assert sum(len(column) for (column,) in read_loop_state(tmp_path).rollout.tokens.values()) == 6
    for damaged in (
        intact[: len(intact) // 2],
        b"",
        b"text",
        intact.replace(b"\x03\0\0\0", b"\x04\0\0\0", 1),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"BadZipFile|EOFError|pickle|magic"):
            read_loop_state(tmp_path)
