"""Groups of a checkpoint keep every bit, and those of earlier versions are read."""

import base64
import io
import json
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.batching.trajectory import VersionSpan
from megatron_fipo.driver.rollout.prompt_group import PromptGroup, Response
from megatron_fipo.driver.rollout.saved_groups import SavedGroup, pack_groups, unpack_groups
from megatron_fipo.run_dir.loop_state import (
    LOOP_FILE,
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
        known = 0 if grown.routes is None else len(grown.routes)
        computed = len(PROBLEMS["p"].prompt_ids) + len(grown.token_ids) + len(tokens) - 1
        rows = draw(st.none() | st.integers(0, computed - known))
        routes = None if rows is None else np.full((rows, 3, 2), 7, np.uint8)
        given = generation([t for t, _ in tokens], [p for _, p in tokens], reason, version)
        grown.add(replace(given, routes=routes))
    return grown


scores = st.builds(
    Score,
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, 1.0]),
    st.text(),
    st.dictionaries(st.text(), st.lists(st.text()))
    | st.dictionaries(st.sampled_from("abc"), st.floats(allow_nan=False, allow_infinity=False)),
)


@st.composite
def saved_groups(draw) -> list[SavedGroup]:
    found = []
    for serial in draw(st.lists(st.integers(0, 10**6), max_size=4, unique=True)):
        problem = draw(st.sampled_from(list(PROBLEMS.values())))
        group = PromptGroup(serial, problem, draw(st.lists(responses(), min_size=1, max_size=4)))
        size = len(group.responses)
        scored = group.finished and draw(st.booleans())
        found.append((group, draw(st.lists(scores, min_size=size, max_size=size)) if scored else None))
    return found


@settings(deadline=None, max_examples=60)
@given(saved_groups())
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


DONE = Response(np.int32([1, 2, 3]), np.float32([-1, -2, -3]), [VersionSpan(2, 0, 3)], "stop")
GROUP = PromptGroup(7, PROBLEMS["q"], [DONE])


def write_one_group(folder: Path) -> None:
    values, tokens = pack_groups([(GROUP, None)])
    write_loop_state(folder, LoopState(1, 1, RolloutState({"groups": values}, tokens)))


def archive(compression: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as written:
        for name, content in members.items():
            written.writestr(f"{name}.npy", content)
    return file.getvalue()


def member(array: np.ndarray, more: bytes = b"") -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue() + more


HUGE = member(np.zeros(1, np.int32)).replace(b"(1,), }             ", b"(1000000000000000,)}")
FOREIGN = {
    "half": lambda intact: intact[: len(intact) // 2],
    "empty": lambda _: b"",
    "text": lambda _: b"text",
    "another number": lambda intact: intact.replace(b"\x03\0\0\0", b"\x04\0\0\0", 1),
    "pickle": lambda _: pickle.dumps([1]),
    "pickled objects": lambda _: archive(token_ids=member(np.array([print], object))),
    "compressed": lambda _: archive(zipfile.ZIP_DEFLATED, token_ids=member(np.zeros(10**6, np.int32))),
    "two dimensions": lambda _: archive(token_ids=member(np.zeros((2, 2), np.int32))),
    "no array": lambda _: archive(token_ids=b"text"),
    "more than an array": lambda _: archive(token_ids=member(np.zeros(1, np.int32), b"more")),
    "a huge array": lambda _: archive(token_ids=HUGE),
    "encrypted": lambda intact: intact.replace(
        b"PK\x01\x02\x2d\x03\x2d\0\0", b"PK\x01\x02\x2d\x03\x2d\0\x01"
    ),
}


@pytest.mark.parametrize("content", FOREIGN)
def test_a_foreign_file_of_tokens_is_one_sentence_with_its_name(tmp_path, content):
    write_one_group(tmp_path)
    assert sum(len(column) for (column,) in read_loop_state(tmp_path).rollout.tokens.values()) == 6
    path = tmp_path / TOKENS_FILE
    foreign = FOREIGN[content](path.read_bytes())
    assert foreign != path.read_bytes()
    path.write_bytes(foreign)
    with pytest.raises(ValueError, match=r"^its tokens\.npz has no readable columns \("):
        read_loop_state(tmp_path)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_damaged_bytes_of_tokens_are_noticed_or_change_nothing(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "damaged_tokens"
    folder.mkdir(exist_ok=True)
    write_one_group(folder)
    path = folder / TOKENS_FILE
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        state = read_loop_state(folder)
        restored = unpack_groups(state.rollout.values["groups"], state.rollout.tokens, PROBLEMS)
    except ValueError:
        return
    assert plain(restored) == plain([(GROUP, None)])


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        "{}",
        '{"iteration": 1, "weight_version": 1}',
        '{"iteration": null, "weight_version": 1, "rollout": {}}',
        '{"iteration": "1", "weight_version": 1, "rollout": {}}',
        '{"iteration": 1.0, "weight_version": 1, "rollout": {}}',
        '{"iteration": NaN, "weight_version": 1, "rollout": {}}',
        '{"iteration": 1, "weight_version": -1, "rollout": {}}',
        '{"iteration": 1, "weight_version": 1, "rollout": null}',
        "[" * 10**5,
    ],
)
def test_a_foreign_loop_file_is_one_sentence_with_its_name(tmp_path, content):
    write_one_group(tmp_path)
    (tmp_path / LOOP_FILE).write_text(content)
    with pytest.raises(ValueError, match=r"^its loop\.json is not a loop state of this version \("):
        read_loop_state(tmp_path)


def test_routes_of_more_tokens_than_a_response_has_are_refused():
    response = Response.of(generation((5, 6), (-0.1, -0.2), "stop", 1))
    response.routes = np.zeros((4, 3, 2), np.uint8)
    with pytest.raises(ValueError, match="has routes of 4 tokens, but 3 were computed"):
        unpack_groups(*pack_groups([(PromptGroup(1, PROBLEMS["p"], [response]), None)]), PROBLEMS)
