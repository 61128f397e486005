"""A file of another format than configured is named as what it is; harmless differences are read."""

import bz2
import gzip
import json
import lzma
import zipfile

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from megatron_fipo.errors import UserError
from megatron_fipo.tasks.row_reader import read_rows
from tests.tasks.files import row, write

LINE = (json.dumps(row()) + "\n").encode()


def contents(tmp_path):
    """What people give as a data file: (content, what it is)."""
    parquet = write(tmp_path / "rows.parquet", [row()]).read_bytes()
    archive = tmp_path / "rows.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("rows.jsonl", LINE)
    stream = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(stream, pyarrow.Table.from_pylist([row()]).schema) as writer:
        writer.write_table(pyarrow.Table.from_pylist([row()]))
    pyarrow.feather.write_feather(pyarrow.Table.from_pylist([row()]), tmp_path / "rows.arrow")
    return {
        "parquet": (parquet, "is a parquet file; set data.source=parquet"),
        "jsonl": (LINE, "looks like JSON lines; set data.source=jsonl"),
        "gzip": (gzip.compress(LINE), "is compressed by gzip"),
        "gzip of parquet": (gzip.compress(parquet), "is compressed by gzip"),
        "bzip2": (bz2.compress(LINE), "is compressed by bzip2"),
        "xz": (lzma.compress(LINE), "is compressed by xz"),
        "zstd": (pyarrow.compress(LINE, "zstd", asbytes=True), "is compressed by zstd"),
        "zip": (archive.read_bytes(), "is a zip archive"),
        "arrow": ((tmp_path / "rows.arrow").read_bytes(), "is an Arrow file; set data.source=arrow"),
        "arrow stream": (stream.getvalue().to_pybytes(), "is an Arrow stream; set data.source=arrow"),
        "utf-16": (LINE.decode().encode("utf-16"), "is text in UTF-16"),
        "lfs": (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "is a Git LFS pointer",
        ),
        "html": (b"\n<!DOCTYPE html><html>Sign in</html>", "is a web page"),
        "list": (b"[" + LINE + b"]", "is one JSON list"),
    }


@pytest.mark.parametrize("configured", ["parquet", "jsonl", "arrow"])
def test_another_format_is_named(tmp_path, configured):
    for name, (content, message) in contents(tmp_path).items():
        path = tmp_path / "data"
        path.write_bytes(content)
        if name.partition(" ")[0] == configured:
            assert list(read_rows(path, configured)) in ([(0, row())], [(1, row())])
            continue
        with pytest.raises(UserError) as error:
            list(read_rows(path, configured))
        assert f"data.source is {configured}, but {path} {message}" in str(error.value), name


def test_a_byte_order_mark_and_line_ends_of_windows_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + LINE.replace(b"\n", b"\r\n") + b"\r\n" + LINE)
    assert [number for number, _ in read_rows(path, "jsonl")] == [1, 3]


def test_a_repeated_key_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    for line in (
        '{"prompt": "1", "prompt": "2"}',
        '{"reward_model": {"ground_truth": "1", "ground_truth": "2"}}',
    ):
        path.write_text(line)
        with pytest.raises(
            UserError, match=r"line 1 cannot be read \(the key '(prompt|ground_truth)' is twice"
        ):
            list(read_rows(path, "jsonl"))


def test_a_parquet_file_without_the_columns_is_named_with_those_it_has(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"problem": ["1"], "answer": ["2"]}), path)
    with pytest.raises(
        UserError,
        match=r"has no column `prompt`; its columns are problem, answer; set data.columns.prompt=problem if that is it",
    ):
        list(read_rows(path, "parquet"))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["1"], "answer": ["2"]}), path)
    with pytest.raises(
        UserError,
        match=r"no column `reward_model`; its .* prompt, answer; set data.columns.ground_truth=answer",
    ):
        list(read_rows(path, "parquet"))


def test_a_repeated_column_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table([["1"], ["2"], [{"ground_truth": "3"}]], names=["prompt", "prompt", "reward_model"])
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(UserError, match="has 2 columns `prompt`; remove all but one"):
        list(read_rows(path, "parquet"))


@pytest.mark.parametrize(
    "values",
    [
        pyarrow.array([1_700_000_000_123_456_789], pyarrow.timestamp("ns")),
        pyarrow.array([2**40], pyarrow.int64()).cast(pyarrow.timestamp("s"), safe=False),
    ],
)
def test_fields_that_are_not_read_may_have_any_type(tmp_path, values):
    path = tmp_path / "a.parquet"
    extra = pyarrow.StructArray.from_arrays([pyarrow.array(["x"]), values], names=["index", "when"])
    answer = pyarrow.StructArray.from_arrays([pyarrow.array(["3"]), values], names=["ground_truth", "when"])
    pyarrow.parquet.write_table(
        pyarrow.table([["1"], answer, extra], names=["prompt", "reward_model", "extra_info"]), path
    )
    assert list(read_rows(path, "parquet")) == [
        (0, {"prompt": "1", "reward_model": {"ground_truth": "3"}, "extra_info": {"index": "x"}})
    ]


def test_a_date_beyond_pythons_is_no_traceback(tmp_path):
    path = tmp_path / "a.parquet"
    when = pyarrow.array([2**40], pyarrow.int64()).cast(pyarrow.timestamp("s"), safe=False)
    pyarrow.parquet.write_table(pyarrow.table([["1"], when], names=["prompt", "reward_model"]), path)
    with pytest.raises(UserError, match="is not a readable parquet file"):
        list(read_rows(path, "parquet"))
