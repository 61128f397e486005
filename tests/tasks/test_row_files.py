"""Sets of several files: shards in a folder, patterns, and folders as Hugging Face `datasets` saves them."""

import json

import pyarrow
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest

from megatron_fipo.errors import UserError
from megatron_fipo.tasks.row_files import row_files
from tests.tasks.files import read, row, write


def write_stream(path, rows):
    """As `datasets` writes Arrow: a stream in batches of a few rows."""
    table = pyarrow.Table.from_pylist(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


def save_to_disk(folder, rows, shards=2):
    """A split as `Dataset.save_to_disk` writes it."""
    size = -(-len(rows) // shards)
    files = []
    for number in range(shards):
        files.append(f"data-{number:05d}-of-{shards:05d}.arrow")
        write_stream(folder / files[-1], rows[number * size : (number + 1) * size])
    (folder / "state.json").write_text(
        json.dumps(
            {"_data_files": [{"filename": name} for name in files], "_fingerprint": "f", "_split": "train"}
        )
    )
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return folder


ROWS = [row(f"{number}+1", str(number), index=None) for number in range(7)]


def shards(folder, split="train", total=3, suffix="parquet"):
    folder.mkdir(exist_ok=True)
    return [
        write(folder / f"{split}-{number:05d}-of-{total:05d}.{suffix}", ROWS[number::total])
        for number in range(total)
    ]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_the_shards_of_a_folder_are_one_set_with_unique_ids(tmp_path, suffix):
    shards(tmp_path / "data", suffix=suffix)
    problems = read(tmp_path / "data", source=suffix)
    assert [problem.ground_truth for problem in problems] == ["0", "3", "6", "1", "4", "2", "5"]
    assert [problem.problem_id for problem in problems] == list("0123456")
    shards(tmp_path / "data", "test", suffix=suffix)
    assert len(read(tmp_path / f"data/train-*.{suffix}", source=suffix)) == 7


def test_a_bad_row_of_a_shard_is_named_with_its_file(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train-00000-of-00002.parquet", ROWS[:3])
    write(folder / "train-00001-of-00002.parquet", [ROWS[4], row("1", answer=" ")])
    with pytest.raises(
        UserError, match=r"train-00001-of-00002.parquet row 1 has no `reward_model.ground_truth`"
    ):
        read(folder, source="parquet")
    write(folder / "train-00001-of-00002.parquet", [row("0+1", answer="5")])
    logged = []
    read(folder, source="parquet", log=logged.append)
    assert "rows train-00000-of-00002.parquet:0 ('0') and train-00001-of-00002.parquet:0 ('5')" in logged[1]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["train-00000-of-00002.parquet"] * 1 + ["test-00000-of-00001.parquet"],
            "has the splits test, train; give .*train-\\*",
        ),
        (["train-00000-of-00003.parquet", "train-00002-of-00003.parquet"], "lacks shard 00001 of 3"),
        (["train-00000-of-00002.parquet", "train-00001-of-00003.parquet"], "has shards of several downloads"),
        (
            ["train.parquet", "test.parquet"],
            r"has 2 files, which may be splits \(test.parquet, train.parquet\); .*/\*.parquet",
        ),
        (
            ["train.jsonl"],
            "without \\*.parquet files, but has those of another format; set data.source=jsonl",
        ),
        (["a/train-00000-of-00001.parquet", "b/x.parquet"], "its folders a, b have some: give .*/a"),
        (["README.md"], "is a folder without \\*.parquet files; check data.source and the path"),
        ([], "is a folder without \\*.parquet files"),
    ],
)
def test_a_folder_that_is_not_one_set_is_refused(tmp_path, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"PAR1")
    with pytest.raises(UserError, match=message):
        row_files(tmp_path, "parquet")


def test_one_file_of_a_folder_and_files_with_pattern_characters_are_read(tmp_path):
    only = write(tmp_path / "train.parquet", ROWS)
    assert row_files(tmp_path, "parquet") == [only]
    odd = write(tmp_path / "a[1]*.parquet", ROWS)
    assert row_files(odd, "parquet") == [odd]
    with pytest.raises(UserError, match=r"no file matches .*\*.jsonl; correct the path"):
        row_files(tmp_path / "*.jsonl", "jsonl")


def test_a_split_that_datasets_saved_is_read(tmp_path):
    folder = save_to_disk(tmp_path / "saved/train", ROWS)
    problems = read(folder, source="arrow")
    assert [problem.ground_truth for problem in problems] == list("0123456")
    (folder / "cache-1234.arrow").write_bytes(b"of a map, not of the data")
    assert len(read(folder, source="arrow")) == 7
    with pytest.raises(
        UserError, match=r"is a folder that Hugging Face datasets saved; set data.source=arrow"
    ):
        read(folder, source="parquet")
    (tmp_path / "saved/dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    with pytest.raises(
        UserError, match=r"saved has the splits train, test of a data set; give .* such as .*/saved/train"
    ):
        read(tmp_path / "saved", source="arrow")
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"lacks data-00001-of-00002.arrow, which its state.json names"):
        read(folder, source="arrow")


@pytest.mark.parametrize(
    "state",
    [
        "",
        "[]",
        "{}",
        '{"_data_files": []}',
        '{"_data_files": [7]}',
        '{"_data_files": [{"file": "x"}]}',
        "[" * 100_000,
    ],
)
def test_a_damaged_state_is_named(tmp_path, state):
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(UserError, match=r"state.json does not list _data_files"):
        row_files(tmp_path, "arrow")


@pytest.mark.parametrize("name", ["../x.arrow", "/etc/passwd", "a/b.arrow"])
def test_a_state_names_files_of_its_folder_alone(tmp_path, name):
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(UserError, match=r"which is not in its folder"):
        row_files(tmp_path, "arrow")


def test_an_arrow_file_with_a_footer_is_read_as_a_stream_is(tmp_path):
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.feather.write_feather(table, tmp_path / "a.arrow")
    write_stream(tmp_path / "b.arrow", ROWS)
    first, second = (read(tmp_path / name) for name in ("a.arrow", "b.arrow"))
    assert first == second
    content = (tmp_path / "b.arrow").read_bytes()
    for end in (len(content) // 3, len(content) // 2, 9):
        (tmp_path / "b.arrow").write_bytes(content[:end])
        with pytest.raises(
            UserError, match=r"b.arrow (is not a readable Arrow file|cannot be read from row)"
        ):
            read(tmp_path / "b.arrow")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_columns_of_bytes_and_dates_are_left_out_and_reported(tmp_path, name):
    when = pyarrow.array([2**40, None], pyarrow.int64()).cast(pyarrow.timestamp("s"), safe=False)
    texts = pyarrow.array(["x", "y"])
    image = pyarrow.array([[{"bytes": b"1", "path": "a"}], None])
    extra = pyarrow.StructArray.from_arrays(
        [texts, when, pyarrow.array([[1], [2, 3]])],
        names=["index", "when", "numbers"],
        mask=pyarrow.array([False, True]),
    )
    answer = pyarrow.StructArray.from_arrays([texts, texts], names=["ground_truth", "style"])
    table = pyarrow.table(
        [pyarrow.array(["1", "2"]), answer, extra, when, image, pyarrow.array([0.5, None])],
        names=["prompt", "reward_model", "extra_info", "day", "images", "level"],
    )
    path = tmp_path / name
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(table, path)
    else:
        pyarrow.feather.write_feather(table, path)
    logged = []
    first, second = read(path, log=logged.append, keep_columns=True)
    assert first.columns == {
        "prompt": "1",
        "reward_model": {"ground_truth": "x", "style": "x"},
        "extra_info": {"index": "x", "numbers": [1]},
        "level": 0.5,
    }
    assert second.columns["level"] is None
    assert (first.problem_id, second.problem_id) == ("x", "1")
    assert logged == [
        f"{path}: rewards do not get the columns day, extra_info.when, images, whose values are not texts, numbers, lists or "
        "objects"
    ]
    assert read(path)[0].columns == {}
