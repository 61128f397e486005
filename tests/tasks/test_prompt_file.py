"""Reading data files: prompts through the tokenizer's template, duplicates dropped, every bad row named."""

import json
import os
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_fipo.config import DataConfig
from megatron_fipo.errors import UserError
from megatron_fipo.tasks.countdown.tokenizer import build_tokenizer
from megatron_fipo.tasks.prompt_encoder import PromptEncoder
from megatron_fipo.tasks.prompt_file import PARQUET_BATCH_ROWS, read_problems
from megatron_fipo.tasks.registry import load_datasets, load_evaluation

TEMPLATE = "{% for m in messages %}{{ '|' + m['content'] + '|' }}{% endfor %}{% if add_generation_prompt %}&{% endif %}"


def row(prompt="1+1", answer="2", index=None, **fields):
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return {
        "prompt": messages,
        "reward_model": {"ground_truth": answer},
        "data_source": "math",
        "extra_info": {"index": index},
    } | fields


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
    else:
        path.write_text("\n".join(json.dumps(r) for r in rows) + "\n", encoding="utf-8")
    return path


def read(path, tokenizer=None, limit=50, deduplicate=True, log=print):
    return read_problems(
        path, path.suffix[1:], PromptEncoder(tokenizer or build_tokenizer(), limit), deduplicate, log
    )


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_rows_become_problems(tmp_path, name):
    first, second = read(write(tmp_path / name, [row("1+1", "2", "x7"), row("3*3", "9")]))
    assert (first.problem_id, first.prompt_text, first.ground_truth, first.data_source) == (
        "x7",
        "1+1",
        "2",
        "math",
    )
    assert first.extra == {"index": "x7"}
    assert second.prompt_ids == tuple(build_tokenizer()("3*3")["input_ids"])
    assert second.problem_id in {"1", "2"}  # rows count from 0, lines from 1


def test_messages_go_through_the_chat_template_and_a_text_stays_as_it_is(tmp_path):
    messages = [{"role": "system", "content": "1"}, {"role": "user", "content": "2"}]
    path = write(tmp_path / "a.jsonl", [row(messages), row() | {"prompt": "3:"}])
    tokenizer = build_tokenizer()
    assert [p.prompt_text for p in read(path, tokenizer)] == ["1\n2", "3:"]
    tokenizer.chat_template = TEMPLATE
    assert [p.prompt_text for p in read(path, tokenizer)] == ["|1||2|&", "3:"]
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(
        UserError, match=r"a.jsonl line 1: the chat template refuses the prompt \(no system role\)"
    ):
        read(path, tokenizer)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_repeated_prompts_go_and_are_counted_once(tmp_path, name):
    rows = [row(f"{i % 7}+1", "2", f"i{i}") for i in range(1100)]
    path = write(tmp_path / name, rows)
    logged = []
    problems = read(path, log=logged.append)
    assert [p.problem_id for p in problems] == [f"i{i}" for i in range(7)]
    assert logged == [f"{path}: dropped 1,093 of 1,100 rows with a duplicate prompt"]
    assert len(read(path, deduplicate=False, log=logged.append)) == 1100
    assert len(logged) == 1


def test_problem_ids_are_unique_even_where_an_index_comes_again(tmp_path):
    path = write(tmp_path / "a.jsonl", [row("1", index="i"), row("2", index="i"), row("3", index=0)])
    assert [p.problem_id for p in read(path)] == ["i", "i@2", "0"]


def test_parquet_files_larger_than_a_batch_keep_order_and_row_numbers(tmp_path):
    rows = [row(str(i), str(i)) for i in range(PARQUET_BATCH_ROWS + 10)]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert [p.problem_id for p in read(path)] == [str(i) for i in range(len(rows))]
    rows[-3]["reward_model"] = {"ground_truth": None}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(
        UserError, match=f"a.parquet row {PARQUET_BATCH_ROWS + 7} has no `reward_model.ground_truth`"
    ):
        read(path)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"reward_model": {"ground_truth": "2"}}, "line 2 has no usable `prompt`"),
        (row() | {"prompt": []}, "line 2 has no usable `prompt`"),
        (row() | {"prompt": [{"role": "user"}]}, "line 2 has no usable `prompt`"),
        (row() | {"prompt": 7}, "line 2 has no usable `prompt`"),
        ({"prompt": "1"}, "line 2 has no `reward_model.ground_truth`"),
        (row("5", answer=""), "line 2 has no `reward_model.ground_truth`"),
        (row("5") | {"reward_model": "2"}, "line 2 has a `reward_model` that is not an object"),
        (row("9" * 51), r"line 2 has a prompt of 51 tokens, above rollout.max_prompt_length = 50"),
        (row(""), "line 2 has a prompt without tokens"),
        ([1, 2], "line 2 is not a JSON object"),
    ],
)
def test_a_bad_row_is_named(tmp_path, bad, message):
    with pytest.raises(UserError, match=message):
        read(write(tmp_path / "a.jsonl", [row(), bad]))


def test_a_number_is_an_answer_too(tmp_path):
    assert read(write(tmp_path / "a.jsonl", [row(answer=0)]))[0].ground_truth == "0"


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(UserError, match=r"missing.parquet does not exist"):
        read(tmp_path / "missing.parquet")
    (tmp_path / "a.jsonl").write_text('{"prompt": "1"\n')
    with pytest.raises(UserError, match=r"a.jsonl line 1 is not JSON"):
        read(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match=r"b.jsonl has no rows"):
        read(tmp_path / "b.jsonl")
    (tmp_path / "a.parquet").write_text("not parquet")
    with pytest.raises(UserError, match=r"a.parquet is not a readable parquet file"):
        read(tmp_path / "a.parquet")


def damage(path, old, new):
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    return path


def test_damaged_files_are_named(tmp_path):
    path = damage(write(tmp_path / "a.jsonl", [row(), row("5+5")]), b"5+5", b"5\xe45")
    with pytest.raises(UserError, match=r"a.jsonl line 2 is not UTF-8 \(byte \d+\)"):
        read(path)

    for beyond in ("[" * 100_000, "1" * 5000):
        path.write_text(f"{beyond}\n")
        with pytest.raises(UserError, match=r"a.jsonl line 1 is beyond what can be read"):
            read(path)

    def parquet(**options):
        path = tmp_path / "a.parquet"
        rows = [row(f"{i}+" * 4, index=str(i)) for i in range(PARQUET_BATCH_ROWS + 50)]
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), path, row_group_size=PARQUET_BATCH_ROWS, **options
        )
        return path, str(PARQUET_BATCH_ROWS + 20).encode()

    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    path, late = parquet(**plain)
    damage(path, late + b"+", b"\xff" * len(late) + b"+")  # text that is not UTF-8
    with pytest.raises(UserError, match=rf"a.parquet cannot be read from row {PARQUET_BATCH_ROWS} on \("):
        read(path, limit=99)
    path, late = parquet(**plain)
    damage(
        path, b"\x14\x00\x00\x00" + late + b"+", b"\xff\xff\xff\xff" + late + b"+"
    )  # a length beyond the page
    with pytest.raises(UserError, match=rf"a.parquet cannot be read from row {PARQUET_BATCH_ROWS} on \("):
        read(path, limit=99)
    path, _ = parquet(compression="snappy")
    path.write_bytes(path.read_bytes()[:40] + b"\xff" * 400 + path.read_bytes()[440:])
    with pytest.raises(UserError, match=r"a.parquet is not a readable parquet file"):
        read(path, limit=99)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_a_file_that_the_system_refuses_is_named(tmp_path, name):
    memory = Path("/proc/self/mem")  # a file whose first byte not even root can read
    if not memory.is_file():
        pytest.skip("needs Linux")
    (tmp_path / name).symlink_to(memory)
    with pytest.raises(UserError, match=rf"{name} ") as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("closed", ["file", "folder"])
@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_a_file_without_permission_is_named(name, closed):
    tokenizer = build_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / name, [row()])
        path.chmod(0 if closed == "file" else 0o644)
        Path(folder).chmod(0 if closed == "folder" else 0o755)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root may read everything
        try:
            with pytest.raises(UserError, match=rf"cannot read .*{name} \(Permission denied\)"):
                read(path, tokenizer)
        finally:
            os.seteuid(user)
            Path(folder).chmod(0o755)


def test_load_datasets_says_which_rows_of_which_file_went(tmp_path):
    train = write(tmp_path / "train.parquet", [row("1"), row("1"), row("2")])
    held_out = write(tmp_path / "test.jsonl", [row("9")] * 4)
    logged = []
    load_datasets(
        DataConfig(train_path=str(train), evaluation_path=str(train)), 50, build_tokenizer(), 1, logged.append
    )
    assert logged == [f"{train}: dropped 1 of 3 rows with a duplicate prompt"] * 2
    load_evaluation(
        DataConfig(source="jsonl", evaluation_path=str(held_out)), 50, build_tokenizer(), 1, logged.append
    )
    assert logged[2:] == [f"{held_out}: dropped 3 of 4 rows with a duplicate prompt"]


def test_load_datasets_from_files(tmp_path):
    train = write(tmp_path / "train.parquet", [row(str(i)) for i in range(5)])
    held_out = write(tmp_path / "test.parquet", [row("9+9")])
    config = DataConfig(source="parquet", train_path=str(train), evaluation_path=str(held_out))
    dataset, evaluation = load_datasets(config, 50, build_tokenizer(), seed=1)
    assert len(dataset) == 5
    assert [p.prompt_text for p in evaluation] == ["9+9"]

    config.evaluation_path = None
    assert load_datasets(config, 50, build_tokenizer(), seed=1)[1] == []
    config.train_path = None
    with pytest.raises(UserError, match=r"data.train_path is not set"):
        load_datasets(config, 50, build_tokenizer(), seed=1)


def test_load_datasets_of_countdown():
    config = DataConfig(source="countdown", train_size=30, evaluation_size=10)
    dataset, evaluation = load_datasets(config, 20, build_tokenizer(), seed=1)
    assert len(dataset) == 30
    assert evaluation == load_evaluation(config, 20, build_tokenizer(), seed=1)
    problem = evaluation[0]
    assert problem.prompt_text == problem.ground_truth + ":"
    assert build_tokenizer().decode(list(problem.prompt_ids)) == problem.prompt_text
    with pytest.raises(
        UserError,
        match=r"countdown problem .* has a prompt of \d+ tokens, above rollout.max_prompt_length = 5",
    ):
        load_datasets(config, 5, build_tokenizer(), seed=1)


def test_a_tokenizer_without_an_end_and_an_unknown_source_are_refused():
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load_datasets(DataConfig(source="countdown"), 20, tokenizer, seed=1)
    with pytest.raises(UserError, match="'csv'; choose one of parquet, jsonl, countdown"):
        load_datasets(DataConfig(source="csv"), 20, build_tokenizer(), seed=1)
