"""Dumped iterations are read bit for bit, or not at all; a replay refuses dumps that do not fit."""

import itertools
import json
import math
import os
import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_fipo.batching.trajectory import Trajectory, VersionSpan
from megatron_fipo.driver.rollout import dump
from megatron_fipo.driver.rollout.dump import (
    HEADER,
    DumpFolder,
    dump_path,
    read_dump,
    read_header,
    write_dump,
)
from megatron_fipo.errors import UserError
from tests.generations import plain

FLOATS = st.floats(allow_nan=True, allow_infinity=True)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def groups_of_responses(draw) -> list[list[Trajectory]]:
    ids = draw(st.lists(st.text(st.characters(codec="utf-8"), max_size=8), unique=True, max_size=5))
    return [[draw(response(group_id)) for _ in range(draw(st.integers(1, 4)))] for group_id in ids]


@st.composite
def response(draw, group_id: str) -> Trajectory:
    length = draw(st.integers(0, 12))
    cuts = sorted(draw(st.sets(st.integers(1, max(length - 1, 1)), max_size=2)))
    bounds = [0, *(cut for cut in cuts if cut < length), length]
    return Trajectory(
        group_id=group_id,
        prompt_ids=draw(st.lists(st.integers(0, 2**31 - 1), max_size=6)),
        response_ids=draw(st.lists(st.integers(0, 2**31 - 1), min_size=length, max_size=length)),
        response_mask=draw(st.lists(st.integers(0, 1), min_size=length, max_size=length)),
        rollout_log_probs=draw(st.lists(st.floats(width=32), min_size=length, max_size=length)),
        spans=[VersionSpan(draw(st.integers(0, 2**40)), *bound) for bound in itertools.pairwise(bounds)],
        finish_reason=draw(st.sampled_from(["stop", "length"])),
        reward=draw(FLOATS),
        accuracy=draw(FLOATS),
        advantage=draw(FLOATS),
        extra=draw(st.dictionaries(st.text(), JSON, max_size=3)),
    )


def bits(value: Any) -> Any:
    """The value with floats as their 64 bits, to compare -0.0, NaN and all digits, and 1 with 1.0."""
    if isinstance(value, np.ndarray):
        return plain(value)
    if isinstance(value, float):
        return ("float", "nan") if math.isnan(value) else struct.pack("<d", value)
    if isinstance(value, list | tuple):
        return [bits(item) for item in value]
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, Trajectory | VersionSpan):
        return (type(value).__name__, bits(vars(value)))
    return (type(value).__name__, value)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(groups=groups_of_responses(), at_once=st.integers(1, 3))
def test_what_is_read_is_what_was_written(tmp_path, groups, at_once) -> None:
    """Every field and bit, the order of groups and responses, over any number of row groups."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dump, "GROUPS_AT_ONCE", at_once)
        path = write_dump(tmp_path, 12, groups, 0.1 + 0.2)
    assert path == tmp_path / "iteration_000012.parquet"
    assert bits(read_dump(path)) == bits(groups)
    assert read_header(path) == {"format": 3, "iteration": 12, "temperature": 0.1 + 0.2}
    assert os.listdir(tmp_path) == [path.name]


def trajectory(group_id: str = "g", length: int = 3, **fields: Any) -> Trajectory:
    made = Trajectory(
        group_id=group_id,
        prompt_ids=[1, 2],
        response_ids=list(range(length)),
        response_mask=[1] * length,
        rollout_log_probs=[-0.5] * length,
        spans=[VersionSpan(4, 0, 1), VersionSpan(5, 1, length)],
        finish_reason="stop",
        reward=1.0,
        accuracy=1.0,
        advantage=0.5,
        extra={"answer": "7"},
    )
    return replace(made, **fields)


def two_groups() -> list[list[Trajectory]]:
    return [[trajectory(name, reward=float(i)) for i in range(2)] for name in ("a", "b")]


def test_other_tools_see_plain_columns(tmp_path) -> None:
    table = pyarrow.parquet.read_table(write_dump(tmp_path, 1, two_groups(), 1.0))
    assert table.column_names == [name for name in vars(trajectory()) if name != "routes"]
    assert table["group_id"].to_pylist() == ["a", "a", "b", "b"]
    assert table["rollout_log_probs"].type.value_type == pyarrow.float32()
    assert table["spans"].to_pylist()[0] == [
        {"version": 4, "start": 0, "end": 1},
        {"version": 5, "start": 1, "end": 3},
    ]


@pytest.mark.parametrize("number", [1, 2])
def test_dumps_of_earlier_formats_are_read(tmp_path, number) -> None:
    """Format 1 had the log-probs in float64, exact values of float32; neither had sets."""
    given_ = trajectory(rollout_log_probs=np.float32([-0.1, -1e-7, -30]))
    path = write_dump(tmp_path, 1, [[given_]], 1.0)
    table = pyarrow.parquet.read_table(path).select(dump.SCHEMAS[number].names).cast(dump.SCHEMAS[number])
    header = {"format": number, "iteration": 1, "temperature": 1.0}
    pyarrow.parquet.write_table(table.replace_schema_metadata({HEADER: json.dumps(header)}), path)
    ((found,),) = read_dump(path)
    assert bits(found) == bits(given_)


def test_a_failed_write_leaves_the_folder_as_it_was(tmp_path) -> None:
    before = write_dump(tmp_path, 1, two_groups(), 1.0).read_bytes()
    bad: list[tuple[type[Exception], str, list[list[Trajectory]]]] = [
        (
            UserError,
            "group b cannot be dumped",
            [[trajectory("a")], [trajectory("b", extra={"answer": object()})]],
        ),
        (ValueError, "group_id", [[trajectory("a")], [trajectory("a")]]),
        (ValueError, "group_id", [[trajectory("a"), trajectory("b")]]),
        (ValueError, "empty", [[trajectory("a")], []]),
    ]
    for kind, message, groups in bad:
        with pytest.raises(kind, match=message):
            write_dump(tmp_path, 1, groups, 1.0)
        assert os.listdir(tmp_path) == ["iteration_000001.parquet"]
        assert dump_path(tmp_path, 1).read_bytes() == before


def test_a_disk_that_refuses_is_named(tmp_path) -> None:
    (tmp_path / "rollouts").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*iteration_000001.parquet"):
        write_dump(tmp_path / "rollouts", 1, two_groups(), 1.0)


def test_every_truncation_and_every_damaged_byte_of_the_data_is_noticed(tmp_path) -> None:
    path = write_dump(tmp_path, 1, two_groups(), 1.0)
    intact = path.read_bytes()
    for size in range(0, len(intact), 397):
        path.write_bytes(intact[:size])
        with pytest.raises(UserError, match=r"iteration_000001.parquet is not a readable dump"):
            read_dump(path)
    noticed = 0
    for position in range(0, len(intact), 41):
        path.write_bytes(intact[:position] + bytes([intact[position] ^ 64]) + intact[position + 1 :])
        try:
            found = read_dump(path)
        except UserError:
            noticed += 1
        else:
            assert bits(found) == bits(two_groups())  # a byte that does not affect the rows
    assert noticed > len(intact) / 41 / 3


def test_files_that_are_no_dumps_are_named(tmp_path) -> None:
    other, newer, missing, garbled = (
        tmp_path / f"{name}.parquet" for name in ("other", "newer", "missing", "garbled")
    )
    table = pyarrow.table({"group_id": ["a"]})
    pyarrow.parquet.write_table(table, other)
    for path, header in (
        (newer, {"format": 4, "iteration": 1, "temperature": 1.0}),
        (garbled, {"format": 1}),
    ):
        pyarrow.parquet.write_table(table.replace_schema_metadata({HEADER: json.dumps(header)}), path)
    columns = tmp_path / "columns.parquet"
    header = {"format": 3, "iteration": 1, "temperature": 1.0}
    pyarrow.parquet.write_table(table.replace_schema_metadata({HEADER: json.dumps(header)}), columns)
    for path, message in {
        other: "other.parquet is a parquet file, but not a dump",
        newer: "newer.parquet has format 4, but this version reads 1, 2, 3",
        missing: r"cannot read .*missing.parquet \(No such file",
        garbled: "garbled.parquet is not a readable dump .*header is incomplete",
        columns: "columns.parquet is not a readable dump .*columns differ",
    }.items():
        with pytest.raises(UserError, match=message):
            read_dump(path)


def test_a_replay_gives_each_iteration_its_groups(tmp_path) -> None:
    for iteration in (1, 2, 10):
        write_dump(
            tmp_path, iteration, [[trajectory(f"{iteration}-{g}") for _ in range(2)] for g in range(3)], 0.7
        )
    (tmp_path / ".iteration_000003.parquet").write_text("half written")
    (tmp_path / "notes.txt").write_text("")
    source = DumpFolder(tmp_path, 0.7, 10)
    for iteration in (10, 1, 2):
        collected = source.groups(iteration)
        assert bits(collected.groups) == bits(read_dump(dump_path(tmp_path, iteration)))
        assert collected.groups[0][0].group_id == f"{iteration}-0"
        assert collected.counts.used_tokens == 3 * 2 * 3
        assert collected.counts.prompts == collected.counts.generated_tokens == 0
    with pytest.raises(
        UserError, match=r"has no iteration_000003.parquet, only 3 iterations from 1 to 10; .*dump_every=1"
    ):
        source.groups(3)


def test_a_replay_refuses_folders_and_temperatures_before_it_starts(tmp_path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=r"contains no iteration_\*.parquet"):
            DumpFolder(folder, 1.0, 10)
    write_dump(tmp_path, 1, two_groups(), 1.0)
    write_dump(tmp_path, 2, two_groups(), 0.9)
    with pytest.raises(
        UserError,
        match=r"iteration_000002.parquet was sampled at temperature 0.9, but rollout.temperature=1.0",
    ):
        DumpFolder(tmp_path, 1.0, 10)
    dump_path(tmp_path, 2).write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"iteration_000002.parquet is not a readable dump"):
        DumpFolder(tmp_path, 1.0, 10)
    dump_path(tmp_path, 1).rename(dump_path(tmp_path, 2))
    with pytest.raises(UserError, match=r"iteration_000002.parquet was written as iteration 1"):
        DumpFolder(tmp_path, 1.0, 10)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            [[trajectory("a", response_ids=[0, 1, 10])]],
            "group a has the token id 10, but the model's vocabulary has 10",
        ),
        ([[trajectory("a", prompt_ids=[-1])]], "the token id -1"),
        ([[trajectory("a", prompt_ids=[])]], "no prompt"),
        ([[trajectory("a", response_mask=[1])]], "length differs"),
        ([[trajectory("a", rollout_log_probs=[])]], "length differs"),
        ([[trajectory("a", spans=[])]], "do not cover"),
        ([[trajectory("a", spans=[VersionSpan(1, 0, 1), VersionSpan(1, 2, 3)])]], "do not cover"),
        ([[trajectory("a")], [trajectory("b"), trajectory("b")]], r"groups of \[1, 2\] responses"),
        ([], r"groups of \[\] responses"),
    ],
)
def test_a_replay_names_what_does_not_fit(tmp_path, groups, message) -> None:
    write_dump(tmp_path, 4, groups, 1.0)
    with pytest.raises(UserError, match=f"iteration_000004.parquet.*{message}"):
        DumpFolder(tmp_path, 1.0, 10).groups(4)
