"""Rows of supervised training: prompt and response in every form, tokens with their end, and errors that name row and column."""

import pytest

from megatron_fipo.errors import UserError
from megatron_fipo.hooks import HookError
from megatron_fipo.tasks.countdown.tokenizer import build_tokenizer
from megatron_fipo.tasks.prompt_encoder import PromptEncoder
from megatron_fipo.tasks.supervised_rows import (
    EncodeResponse,
    Example,
    ResponseColumns,
    SupervisedRows,
    parse_example,
    read_examples,
    split_held_out,
)
from tests.tasks.files import NOW, write

TEMPLATE = (
    "{% for m in messages %}{{ m['content'] + ';' }}{% endfor %}{% if add_generation_prompt %}#{% endif %}"
)
USER = {"role": "user", "content": "1+1"}
ASSISTANT = {"role": "assistant", "content": "2"}


def read(path, template=TEMPLATE, max_length=50, drop=False, source=None, log=print, **columns):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    rows = SupervisedRows(str(path), source or path.suffix[1:], ResponseColumns(**columns), max_length, drop)
    end_ids = frozenset({tokenizer.eos_token_id})
    return read_examples(
        rows, PromptEncoder(tokenizer, 4000, NOW), EncodeResponse(tokenizer, end_ids), log
    ), tokenizer


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
@pytest.mark.parametrize(
    ("row", "columns", "prompt"),
    [
        ({"prompt": "1+1", "response": "2"}, {}, "1+1"),
        ({"prompt": [USER], "response": "2"}, {}, "1+1;#"),
        ({"prompt": [USER], "completion": [ASSISTANT]}, {"response": "completion"}, "1+1;#"),
        ({"m": [USER, ASSISTANT]}, {"prompt": "m", "response": "m"}, "1+1;#"),
        ({"a": {"q": "1+1", "s": "2"}}, {"prompt": "a.q", "response": "a.s"}, "1+1"),
    ],
    ids=["texts", "messages", "completion", "conversation", "fields"],
)
def test_a_response_is_in_tokens_after_the_generation_prompt_and_ends(tmp_path, name, row, columns, prompt):
    (example,), tokenizer = read(write(tmp_path / name, [row]), **columns)
    assert tokenizer.decode(example.prompt_ids) == prompt
    assert example.response_ids == (
        *tokenizer("2", add_special_tokens=False)["input_ids"],
        tokenizer.eos_token_id,
    )


def test_a_conversation_keeps_its_earlier_answers_in_the_prompt():
    turns = [USER, ASSISTANT, {"role": "user", "content": "3"}, {"role": "assistant", "content": "4"}]
    prompt, response = parse_example("row 1", {"m": turns}, ResponseColumns("m", "m"))
    assert (prompt, response) == ((("user", "1+1"), ("assistant", "2"), ("user", "3")), "4")


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        (
            {"question": "1"},
            {},
            "line 2 has no `prompt`; its keys are question; set data.columns.prompt=question",
        ),
        ({"prompt": "1", "output": "2"}, {}, "line 2 has no `response`; .* set data.columns.response=output"),
        ({"prompt": "1", "response": ""}, {}, "line 2 has no usable `response` but ''"),
        ({"prompt": "1", "response": 2}, {}, "line 2 has no usable `response` but 2"),
        ({"prompt": "1", "response": None}, {}, "line 2 has no usable `response` but None"),
        (
            {"prompt": "1", "response": [USER]},
            {},
            "line 2 .*`response` whose last message is of the role user",
        ),
        (
            {"prompt": "1", "response": [USER, ASSISTANT]},
            {},
            "2 messages .* data.columns.prompt=response too",
        ),
        ({"prompt": "1", "response": "2<eos>"}, {}, "line 2 has a response that contains <eos>"),
        (
            {"prompt": "1", "response": "🙂"},
            {},
            "line 2 has a response with characters that the tokenizer lacks",
        ),
        ({"m": [ASSISTANT]}, {"prompt": "m", "response": "m"}, "line 2 has a `m` of one message"),
        ({"m": "text"}, {"prompt": "m", "response": "m"}, "line 2 has a text as its `m`"),
        (
            {"m": [ASSISTANT, USER]},
            {"prompt": "m", "response": "m"},
            "line 2 .*last message is of the role user",
        ),
    ],
)
def test_an_unusable_row_is_named_with_its_column(tmp_path, row, columns, message):
    good = {"prompt": "1", "response": "2", "m": [USER, ASSISTANT]}
    path = write(tmp_path / "a.jsonl", [good, row])
    with pytest.raises(UserError, match=message):
        read(path, **columns)


def test_a_parquet_file_without_the_column_is_named_with_those_it_has(tmp_path):
    path = write(tmp_path / "a.parquet", [{"prompt": "1", "solution": "2"}])
    with pytest.raises(
        UserError, match=r"a.parquet has no column `response`.*data.columns.response=solution"
    ):
        read(path)


def test_long_rows_are_refused_together_or_left_out_and_counted(tmp_path):
    rows = [{"prompt": "1" * length, "response": "2"} for length in (3, 20, 5, 30)]
    path = write(tmp_path / "a.jsonl", rows)
    fact = r"2 of 4 rows are above data.max_length=10, the longest with 32 tokens \(lines 2, 4\)"
    with pytest.raises(
        UserError, match=f"{fact}; raise it, remove these rows, or set data.overlong_rows=drop"
    ):
        read(path, max_length=10)
    logged = []
    examples, _ = read(path, max_length=10, drop=True, log=logged.append)
    assert [example.length for example in examples] == [5, 7]
    assert [line for line in logged if "are left out" in line]
    assert len(read(path, max_length=32)[0]) == 4  # exactly the limit fits
    with pytest.raises(UserError, match=r"no rows within data\.max_length"):
        read(path, max_length=4, drop=True)


def test_texts_beside_a_chat_template_and_lengths_are_reported(tmp_path):
    logged = []
    read(write(tmp_path / "a.jsonl", [{"prompt": "1+1", "response": "2"}]), log=logged.append)
    assert any(
        "are used without the chat template; data.text_prompts=user_message" in line for line in logged
    )
    assert logged[-1].endswith("1 rows, on average 3 tokens of prompt and 2 of response")


def test_a_function_yields_rows_and_its_bad_row_is_named(tmp_path, monkeypatch):
    (tmp_path / "own_supervised_rows.py").write_text(
        "def rows(path):\n    yield {'prompt': '1', 'response': '2'}\n    yield {'prompt': '1'}\n"
        "def fails(path):\n    raise RuntimeError('no')\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="x row 1 of own_supervised_rows:rows has no `response`"):
        read("x", source="own_supervised_rows:rows")
    with pytest.raises(HookError, match="RuntimeError"):
        read("x", source="own_supervised_rows:fails")


def test_held_out_prompts_are_a_seeded_share_with_all_of_their_rows():
    examples = [Example(str(index), (index % 20,), (index,)) for index in range(60)]
    training, held_out = split_held_out(examples, 0.25, seed=1)
    assert (len(training), len(held_out)) == (45, 15)  # 5 of 20 prompts, three rows each
    assert not {example.prompt_ids for example in training} & {example.prompt_ids for example in held_out}
    assert split_held_out(examples, 0.25, seed=1)[1] == held_out != split_held_out(examples, 0.25, seed=2)[1]
    for share in (0.01, 0.99):
        with pytest.raises(UserError, match=f"data.held_out_share={share} of 20 different prompts is"):
            split_held_out(examples, share, seed=1)
