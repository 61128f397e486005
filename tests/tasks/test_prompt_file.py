"""Reading data files: prompts through the tokenizer's template, duplicates dropped, every bad row named."""

import json
import os
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_fipo.config import Config, DataConfig, EvaluationSet, ModelConfig, RolloutConfig
from megatron_fipo.errors import UserError
from megatron_fipo.tasks.countdown.tokenizer import build_tokenizer
from megatron_fipo.tasks.registry import load_datasets, load_evaluation
from megatron_fipo.tasks.row_reader import BATCH_ROWS
from tests.tasks.files import NOW, read, row, write

TEMPLATE = "{% for m in messages %}{{ '|' + m['content'] + '|' }}{% endfor %}{% if add_generation_prompt %}&{% endif %}"


def settings(limit=50, **data):
    return Config(
        ModelConfig("m"), "r", data=DataConfig(**data), rollout=RolloutConfig(max_prompt_length=limit)
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
    assert second.prompt_ids == tuple(build_tokenizer()("3*3")["input_ids"])
    assert second.problem_id in {"1", "2"}  # rows count from 0, lines from 1


def test_messages_go_through_the_chat_template_and_a_text_stays_as_it_is(tmp_path):
    messages = [{"role": "system", "content": "1"}, {"role": "user", "content": "2"}]
    path = write(tmp_path / "a.jsonl", [row(messages), row() | {"prompt": "3:"}])
    tokenizer = build_tokenizer()
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
    dropped = f"{path}: dropped 1,093 of 1,100 rows with a duplicate prompt"
    assert logged[0] == dropped
    assert len(read(path, deduplicate=False, log=logged.append)) == 1100
    assert logged.count(dropped) == 1


def test_problem_ids_are_unique_even_where_an_index_comes_again(tmp_path):
    path = write(tmp_path / "a.jsonl", [row("1", index="i"), row("2", index="i"), row("3", index=0)])
    assert [p.problem_id for p in read(path)] == ["i", "i@2", "0"]


def test_no_row_is_lost_to_an_index_that_looks_like_a_repeated_one(tmp_path):
    path = write(tmp_path / "a.jsonl", [row("1", index="a@3"), row("2", index="a"), row("3", index="a")])
    assert [(p.problem_id, p.prompt_text) for p in read(path)] == [("a@3", "1"), ("a", "2"), ("a@3@3", "3")]


def test_prompts_that_a_template_makes_equal_or_blank_are_reported(tmp_path):
    tokenizer, logged = build_tokenizer(), []
    path = write(tmp_path / "a.jsonl", [row("1"), row("2"), row("3")])
    tokenizer.chat_template = "1+1"
    assert len(read(path, tokenizer, log=logged.append)) == 3
    assert logged == [
        f"{path}: 2 of 3 different prompts have the formatted text of another one; check the chat template"
    ]
    tokenizer.chat_template = " "
    with pytest.raises(UserError, match="line 1: the chat template makes a blank text of the prompt"):
        read(path, tokenizer)


def test_answers_that_cannot_be_right_are_named_with_their_file(tmp_path):
    train = write(tmp_path / "train.jsonl", [row("1", "34"), row("2", "#### 34"), row("3", "a\u200b")])
    config = settings(source="jsonl", train_path=str(train))
    with pytest.raises(
        UserError, match=r"train.jsonl: 2 of 3 answers cannot be scored by the reward dapo_math: the ground "
    ):
        load_datasets(config, build_tokenizer(), NOW)
    write(train, [row("1", "34"), row("2", "#### 34")])
    with pytest.raises(
        UserError,
        match=r"train.jsonl: an answer cannot be scored .* '#### 34' of problem 2 contains the mark",
    ):
        load_datasets(config, build_tokenizer(), NOW)


def test_answers_that_are_probably_written_differently_are_reported_once_for_a_file(tmp_path):
    answers = ["073", "007", "34", "0", "0.5", "10", r"\frac{1}{2}", "(1, 2]", "no solution", "x+1", "34."]
    path = write(tmp_path / "train.jsonl", [row(str(i), answer) for i, answer in enumerate(answers)])
    logged = []
    load_datasets(settings(source="jsonl", train_path=str(path)), build_tokenizer(), NOW, logged.append)
    assert [line.partition(";")[0] for line in logged[1:]] == [
        f"{path}: 2 of 11 answers have a zero at the front, as '073' of problem 1",
        f"{path}: 1 of 11 answers have a full stop at the end, as '34.' of problem 11",
    ]


def test_parquet_files_larger_than_a_batch_keep_order_and_row_numbers(tmp_path):
    rows = [row(str(i), str(i)) for i in range(BATCH_ROWS + 10)]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert [p.problem_id for p in read(path)] == [str(i) for i in range(len(rows))]
    rows[-3]["reward_model"] = {"ground_truth": None}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(UserError, match=f"a.parquet row {BATCH_ROWS + 7} has no `reward_model.ground_truth`"):
        read(path)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"reward_model": {"ground_truth": "2"}}, "line 2 has no `prompt`; its keys are reward_model"),
        ({"problem": "1", "answer": "2"}, "line 2 has no `prompt`; its keys are problem, answer"),
        (row() | {"prompt": []}, "line 2 has no usable `prompt`"),
        (row() | {"prompt": [{"role": "user"}]}, "line 2 has no usable `prompt`"),
        (row() | {"prompt": 7}, "line 2 has no usable `prompt`"),
        ({"prompt": "1"}, "line 2 has no `reward_model.ground_truth`"),
        (row("5", answer=""), "line 2 has no `reward_model.ground_truth`"),
        (row("5") | {"reward_model": "2"}, "line 2 has a `reward_model` that is not an object"),
        (row("9" * 51), r"line 2 has a prompt of 51 tokens, above rollout.max_prompt_length = 50"),
        (row(""), "line 2 has no usable `prompt`: its messages have no text"),
        ([1, 2], "line 2 is not a JSON object"),
    ],
)
def test_a_bad_row_is_named(tmp_path, bad, message):
    with pytest.raises(UserError, match=message):
        read(write(tmp_path / "a.jsonl", [row(), bad]))


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

    for beyond in ('{"prompt":' * 100_000, "1" * 5000):
        path.write_text(f"{beyond}\n")
        with pytest.raises(UserError, match=r"a.jsonl line 1 cannot be read"):
            read(path)

    def parquet(**options):
        path = tmp_path / "a.parquet"
        rows = [row(f"{i}+" * 4, index=str(i)) for i in range(BATCH_ROWS + 50)]
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), path, row_group_size=BATCH_ROWS, **options
        )
        return path, str(BATCH_ROWS + 20).encode()

    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    path, late = parquet(**plain)
    damage(path, late + b"+", b"\xff" * len(late) + b"+")  # text that is not UTF-8
    with pytest.raises(UserError, match=rf"a.parquet cannot be read from row {BATCH_ROWS} on \("):
        read(path, limit=99)
    path, late = parquet(**plain)
    damage(
        path, b"\x14\x00\x00\x00" + late + b"+", b"\xff\xff\xff\xff" + late + b"+"
    )  # a length beyond the page
    with pytest.raises(UserError, match=rf"a.parquet cannot be read from row {BATCH_ROWS} on \("):
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
    config = settings(train_path=str(train))
    config.evaluation.sets = {"same": EvaluationSet(str(train))}
    load_datasets(config, build_tokenizer(), NOW, logged.append)
    dropped = f"{train}: dropped 1 of 3 rows with a duplicate prompt"
    assert [line for line in logged if "dropped" in line] == [dropped] * 2
    assert logged[-1] == "2 of 2 problems of the evaluation set same are also trained on"
    logged.clear()
    config = settings(source="jsonl")
    config.evaluation.sets = {"one": EvaluationSet(str(held_out))}
    load_evaluation(config, build_tokenizer(), NOW, logged.append)
    assert logged[0] == f"{held_out}: dropped 3 of 4 rows with a duplicate prompt"


def test_load_datasets_from_files(tmp_path):
    train = write(tmp_path / "train.parquet", [row(str(i)) for i in range(5)])
    held_out = write(tmp_path / "test.parquet", [row("9+9")])
    other = write(tmp_path / "other.parquet", [row("8+8"), row("7+7")])
    config = settings(source="parquet", train_path=str(train))
    config.evaluation.sets = {"nine": EvaluationSet(str(held_out)), "others": EvaluationSet(str(other))}
    dataset, evaluation = load_datasets(config, build_tokenizer(), NOW)
    assert len(dataset) == 5
    texts = {name: [p.prompt_text for p in problems] for name, problems in evaluation.items()}
    assert texts == {"nine": ["9+9"], "others": ["8+8", "7+7"]}

    config.evaluation.sets = {}
    assert load_datasets(config, build_tokenizer(), NOW)[1] == {}
    config.data.train_path = None
    with pytest.raises(UserError, match=r"neither data.train_path nor data.sets is set"):
        load_datasets(config, build_tokenizer(), NOW)


def test_load_datasets_of_countdown():
    config = settings(20, source="countdown", train_size=30, evaluation_size=10)
    config.reward.name = "countdown"
    dataset, evaluation = load_datasets(config, build_tokenizer(), NOW)
    assert len(dataset) == 30
    assert evaluation == load_evaluation(config, build_tokenizer(), NOW)
    assert evaluation.keys() == {"countdown"}
    problem = evaluation["countdown"][0]
    assert problem.prompt_text == problem.ground_truth + ":"
    assert build_tokenizer().decode(list(problem.prompt_ids)) == problem.prompt_text
    config.rollout.max_prompt_length = 5
    with pytest.raises(
        UserError,
        match=r"countdown problem .* has a prompt of \d+ tokens, above rollout.max_prompt_length = 5",
    ):
        load_datasets(config, build_tokenizer(), NOW)


def test_a_tokenizer_without_an_end_and_an_unknown_source_are_refused():
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load_datasets(settings(source="countdown"), tokenizer, NOW)
    with pytest.raises(UserError, match="'csv'; choose one of parquet, jsonl, arrow, countdown, or an"):
        load_datasets(settings(source="csv"), build_tokenizer(), NOW)


def test_messages_without_a_chat_template_keep_a_text_only_if_it_is_one_users(tmp_path):
    logged = []
    (problem,) = read(write(tmp_path / "a.jsonl", [row("1+1")]), log=logged.append)
    assert problem.prompt_text == "1+1"
    assert logged == [
        f"{tmp_path}/a.jsonl: the tokenizer has no chat template, so the 1 prompts stored as a message of the user "
        "are its content alone"
    ]
    for roles in (
        ["system", "user"],
        ["user", "assistant", "user"],
        ["system"],
        ["user", "user"],
        ["assistant"],
    ):
        path = write(tmp_path / "b.jsonl", [row([{"role": role, "content": "1"} for role in roles])])
        with pytest.raises(UserError, match=rf"line 1 has messages of the roles {', '.join(roles)}, but"):
            read(path)


def test_json_text_of_messages_is_reported_once(tmp_path):
    tokenizer, logged = build_tokenizer(), []
    tokenizer.chat_template = TEMPLATE
    prompts = [json.dumps([{"role": "user", "content": str(i)}]) for i in range(3)]
    path = write(tmp_path / "a.jsonl", [row() | {"prompt": prompt} for prompt in prompts])
    assert [p.prompt_text for p in read(path, tokenizer, log=logged.append)] == ["|0|&", "|1|&", "|2|&"]
    assert logged == [f"{path}: 3 prompts are JSON text of messages and are read as messages"]


def test_one_prompt_with_different_answers_is_reported_with_both_rows(tmp_path):
    def plain(prompt, answer):
        return row(answer=answer) | {"prompt": prompt}

    path = write(tmp_path / "a.jsonl", [plain("1", "34"), plain("2", 5), plain("1", "35"), plain("2", 5.0)])
    logged = []
    assert [p.ground_truth for p in read(path, log=logged.append)] == ["34", "5"]
    report = "rows with the same prompt have different answers, the first answer is used: lines 1 ('34') and 3 ('35');"
    assert report in logged[1]
    assert len(read(path, deduplicate=False, log=logged.append)) == 4
    assert "all are used: lines 1 ('34') and 3 ('35')" in logged[2]

    path = write(tmp_path / "b.jsonl", [plain("1", str(i)) for i in range(9)])
    read(path, log=logged.append)
    assert "1 ('0') and 6 ('5') and 3 more;" in logged[-1]


def test_all_prompts_above_the_limit_are_named_together(tmp_path):
    rows = [row("1" * (40 + i)) for i in range(18)]
    with pytest.raises(UserError) as error:
        read(write(tmp_path / "a.jsonl", rows))
    assert str(error.value) == (
        f"{tmp_path}/a.jsonl: 7 of 18 rows have a prompt above rollout.max_prompt_length, the longest with 57 tokens "
        "(lines 12, 13, 14, 15, 16 and 2 more); raise the limit, remove these rows, or set data.overlong_prompts=drop "
        "or truncate_left"
    )


def test_a_template_that_prints_the_date_prints_the_given_one(tmp_path):
    tokenizer = build_tokenizer()
    path = write(tmp_path / "a.jsonl", [row("1")])
    for date in (
        "strftime_now('%d %b %Y, %H:%M')",
        "strftime_now(format='%d %b %Y, %H:%M')",
        "strftime_now ('%d %b %Y,\\x20%H:%M' )",
    ):
        tokenizer.chat_template = f"{{{{ {date} }}}}"
        assert [p.prompt_text for p in read(path, tokenizer)] == ["28 Nov 2026, 09:30"]
    for unknown in ("{% set f = '%d' %}{{ strftime_now(f) }}", "{% set f = strftime_now %}{{ f('%d') }}"):
        tokenizer.chat_template = unknown
        with pytest.raises(UserError, match="prints the time in a format that is not a constant"):
            read(path, tokenizer)
    for unused in ("1{# strftime_now(x) #}", "{% if strftime_now is defined %}1{% endif %}"):
        tokenizer.chat_template = unused
        assert [p.prompt_text for p in read(path, tokenizer)] == ["1"]


@pytest.mark.parametrize(
    "template", ["{{ 1 + messages }}", "{{ messages.x.y }}", "{% for %}", "{{ messages[7].role }}"]
)
def test_a_template_that_fails_is_named(tmp_path, template):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=r"a.jsonl line 1: the chat template refuses the prompt \("):
        read(write(tmp_path / "a.jsonl", [row("1")]), tokenizer)
