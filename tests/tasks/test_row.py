"""Values of a row are text, whole numbers, or an error that names row and key; nothing becomes text by guessing."""

import datetime
import json
import math
import os
import random
from decimal import Decimal

import pyarrow
import pyarrow.parquet
import pytest

from megatron_fipo.errors import UserError
from megatron_fipo.tasks.prompt_file import RowSettings, read_problems
from megatron_fipo.tasks.row import parse_row
from tests.tasks.files import ENCODE, row

TEXTS = [
    ("34", "34"),
    (" 34 ", " 34 "),
    ("34.0", "34.0"),
    ("nan", "nan"),
    ("['34']", "['34']"),
    ("½ · π", "½ · π"),
    (34, "34"),
    (0, "0"),
    (-7, "-7"),
    (10**30, str(10**30)),
    (34.0, "34"),
    (-0.0, "0"),
    (2.0**24, "16777216"),
    (Decimal("34.00"), "34"),
]
"""Values, and the text that each is read as."""

NOT_TEXTS = [
    0.5,
    34.25,
    2.0**24 + 2,  # as float32 such a number may have been another one
    1e300,
    math.nan,
    math.inf,
    -math.inf,
    True,
    False,
    ["34"],
    [],
    {"target": ["34"]},
    {},
    b"34",
    Decimal("0.5"),
    Decimal("NaN"),
    datetime.date(2026, 11, 28),
    "34 \ud800",
]


@pytest.mark.parametrize(("value", "text"), TEXTS)
def test_text_and_whole_numbers_are_read(value, text):
    parsed = parse_row("row 0", row(answer=value) | {"data_source": value, "extra_info": {"index": value}})
    assert (parsed.ground_truth, parsed.data_source, parsed.index) == (text, text, text)


@pytest.mark.parametrize("value", NOT_TEXTS, ids=ascii)
@pytest.mark.parametrize("key", ["reward_model.ground_truth", "data_source", "extra_info.index"])
def test_every_other_value_is_an_error_with_row_and_key(key, value):
    column, _, name = key.partition(".")
    with pytest.raises(UserError, match=rf"^row 7 has a `{key}` that is ") as error:
        parse_row("row 7", row() | {column: {name: value} if name else value})
    assert "\n" not in str(error.value)
    str(error.value).encode()


@pytest.mark.parametrize("value", [None, "", " ", "\t\n", "\u200b", " \ufeff"])
def test_a_blank_answer_is_none(value):
    with pytest.raises(UserError, match=r"row 7 has no `reward_model.ground_truth`"):
        parse_row("row 7", row(answer=value))
    assert parse_row("row 7", row() | {"data_source": None, "extra_info": None}).data_source == ""


@pytest.mark.parametrize("value", ["34", 34, 0, False, "", [], ["34"], math.nan, b"{}"])
@pytest.mark.parametrize("key", ["reward_model", "extra_info"])
def test_a_section_is_an_object_or_absent(key, value):
    with pytest.raises(UserError, match=rf"row 7 has a `{key}` that is not an object"):
        parse_row("row 7", row() | {key: value})


MESSAGES = [{"role": "system", "content": "Think."}, {"role": "user", "content": 'What is "1"?'}]
PAIRS = (("system", "Think."), ("user", 'What is "1"?'))


def test_json_text_of_messages_is_read_as_messages():
    for text in (json.dumps(MESSAGES), "\n " + json.dumps(MESSAGES, indent=2)):
        parsed = parse_row("row 7", row() | {"prompt": text})
        assert (parsed.prompt, parsed.prompt_was_json) == (PAIRS, True)
    assert parse_row("row 7", row() | {"prompt": MESSAGES}).prompt == PAIRS


@pytest.mark.parametrize(
    "text",
    [
        str(MESSAGES),  # Python's notation, as pandas writes lists into a CSV
        str(MESSAGES[0]),
        json.dumps(MESSAGES)[:-5],
        json.dumps(MESSAGES[0]),
        json.dumps(json.dumps(MESSAGES)),
        json.dumps([{"role": "user", "content": 3}]),
        "array([{'content': '1', 'role': 'user'}], dtype=object)",  # numpy's notation
        json.dumps([{"from": "human", "value": "1"}]),
        json.dumps([{"role": "user", "content": "1"}]).replace('"1"', '"1", "content": "2"'),
        '[{"role": "user", "content":' + "[" * 100_000,
    ],
)
def test_messages_that_were_turned_into_other_text_are_refused(text):
    with pytest.raises(UserError, match=r"row 7 has (a|no usable) `prompt`"):
        parse_row("row 7", row() | {"prompt": text})


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2, 3] sorted?",
        '{"a": 1}',
        "In a role: play",
        '["role"]',
        "f(x) = {x : role}",
        "{role: x}",
        '{"role": "admin"} is JSON',
    ],
)
def test_text_about_other_json_stays_text(text):
    assert parse_row("row 7", row() | {"prompt": text}).prompt == text


@pytest.mark.parametrize(
    "prompt",
    [
        *(None, "", "  ", 7, 7.0, True, b"1", {}, [], {"role": "user", "content": "1"}),
        *([{"role": "user"}], [{"content": "1"}], [{"role": None, "content": "1"}], ["1"], [["user", "1"]]),
        *(
            [{"role": 1, "content": "1"}],
            [{"role": "user", "content": ["1"]}],
            [{"role": "user", "content": ""}],
        ),
        [{"role": "user", "content": "1"}, None],
    ],
    ids=ascii,
)
def test_a_prompt_is_text_or_messages(prompt):
    with pytest.raises(UserError, match=r"row 7 has no usable `prompt`"):
        parse_row("row 7", row() | {"prompt": prompt})


@pytest.mark.parametrize("place", ["prompt", "role", "content"])
def test_a_lone_surrogate_is_named(place):
    bad = "2 \ud800"
    prompt = bad if place == "prompt" else [{"role": "user", "content": "1"} | {place: bad}]
    with pytest.raises(UserError, match=rf"row 7 has a `{place}` that is not valid Unicode"):
        parse_row("row 7", row() | {"prompt": prompt})


def _scalar(rng):
    return rng.choice([value for value, _ in TEXTS] + NOT_TEXTS + [None, "", "x", "\x00", "a" * 2000])


def _value(rng, depth=0):
    kind = rng.random()
    if depth == 3 or kind < 0.7:
        return _scalar(rng)
    if kind < 0.85:
        return [_value(rng, depth + 1) for _ in range(rng.randrange(3))]
    keys = rng.sample(["role", "content", "ground_truth", "index", "x"], rng.randrange(4))
    return {key: _value(rng, depth + 1) for key in keys}


def _random_row(rng):
    """A valid row in which one to three columns have a random value or are missing."""
    found = row(str(rng.random()), str(rng.randrange(99)))
    for column in rng.sample(["prompt", "reward_model", "data_source", "extra_info"], rng.randrange(1, 4)):
        choice = rng.random()
        if choice < 0.1:
            del found[column]
        elif choice < 0.5 and column in ("reward_model", "extra_info"):
            found[column] = {"ground_truth": _value(rng), "index": _value(rng)}
        else:
            found[column] = _value(rng)
    return found


def _expected(value):
    """The text that a value may be read as, by another path than the code's: its JSON, if that has no fraction."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        return None
    return value if isinstance(value, str) else format(Decimal(value).normalize(), "f").replace("-0", "0")


def _attempt(call):
    """(result, ""), or (None, the error), which must be one printable line."""
    try:
        return call(), ""
    except UserError as error:
        text = str(error)
    assert "\n" not in text
    text.encode()
    return None, text


ROUNDS = int(os.environ.get("MEGATRON_FIPO_FUZZ", "4000"))


def test_fuzz_rows():
    """Random types in every column give an error of one sentence, or exactly the text that was stored."""
    rng = random.Random(1)
    read = 0
    for number in range(ROUNDS):
        values = _random_row(rng)
        parsed, error = _attempt(lambda number=number, values=values: parse_row(f"row {number}", values))
        if parsed is None:
            assert error.startswith(f"row {number} has ")
            continue
        read += 1
        assert parsed.ground_truth == _expected(values["reward_model"]["ground_truth"])
        assert parsed.data_source == (_expected(values.get("data_source")) or "")
        index = (values.get("extra_info") or {}).get("index")
        assert parsed.index == (None if index is None else _expected(index))
        if isinstance(values["prompt"], str):
            assert parsed.prompt == values["prompt"]
        else:
            assert parsed.prompt == tuple((m["role"], m["content"]) for m in values["prompt"])
    assert ROUNDS / 50 < read < ROUNDS / 2


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_fuzz_files(tmp_path, name):
    """The same through files: both formats give problems with valid text, or one sentence."""
    rng = random.Random(2)
    path = tmp_path / name
    for _ in range(ROUNDS // 20):
        values = _random_row(rng)
        try:
            if name == "a.jsonl":
                path.write_text(json.dumps(values) + "\n")
            else:
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist([values]), path)
        except (TypeError, ValueError, OverflowError, pyarrow.ArrowException):
            continue  # the format cannot hold these values
        problems, error = _attempt(lambda: read_problems(RowSettings(str(path), path.suffix[1:]), ENCODE))
        if problems is None:
            assert str(path) in error
        else:
            assert problems[0].ground_truth.strip()
