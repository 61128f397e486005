"""Tests of a problem from its ground truth, the comparison of outputs, and the block that is the answer. No process."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.tasks.code.cases import CaseError, read_cases, same_text, same_value
from megatron_fipo.tasks.code.child.values import plain
from megatron_fipo.tasks.code.reward import last_python_block


def cases(truth):
    return read_cases(json.dumps(truth))


def test_programs():
    case, lines = cases({"inputs": ["1 2\n", ["3", "4"]], "outputs": ["3\n", ["7", ""]], "fn_name": None})
    assert (case.given, case.call, case.expected) == (b"1 2\n", None, "3\n")
    assert (lines.given, lines.expected) == (b"3\n4", "7\n")
    assert case.passed(b"3")
    assert not case.passed(b"4")
    assert not case.passed(b"\xff")


def test_functions():
    first, second, third = cases(
        {"fn_name": "f", "inputs": ["[1, 2]\n3", [[1, 2], 3], [4]], "outputs": ["[5]", [5], {"a": [1]}]}
    )
    assert first.given == second.given == b"[[1, 2], 3]"
    assert first.passed(b"[5]")
    assert not first.passed(b"5")
    assert second.passed(b"[5]")
    assert second.passed(b"5")
    assert third.passed(json.dumps(plain({"a": (1,)})).encode())
    assert not third.passed(b"")
    assert not third.passed(b"[" * 10**5)


@pytest.mark.parametrize(
    ("text", "right", "wrong"),
    [
        ("assert f(1) == (2, 3)", (2, 3), (3, 2)),
        ("assert f(1) == -2.5", -2.5, 2.5),
        ("assert set(f(1)) == set([2, 3])", {3, 2}, {2}),
        ("assert f(1) == {1: {2}}", {1: {2}}, {1: {3}}),
        ("assert f(1) is None", None, 0),
        ("assert f(1)", True, False),
        ("assert not f(1)", False, True),
        ("assert f(1) > 2", None, None),
    ],
)
def test_assertions(text, right, wrong):
    if right is wrong:
        with pytest.raises(CaseError, match=r"not of the form `assert EXPRESSION == LITERAL`, its number 1"):
            cases([text])
        return
    (case,) = cases({"assert_case": [text]})
    assert case.call is not None
    assert case.passed(json.dumps(plain(right)).encode())
    assert not case.passed(json.dumps(plain(wrong)).encode())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("34", "is JSON, but no object"),
        ("[1", "is not JSON"),
        ('{"inputs": [], "outputs": []}', "has no test"),
        ('{"inputs": ["1"], "outputs": []}', "1 inputs and 0 outputs"),
        ('{"inputs": ["1"]}', "has no list outputs"),
        ('{"inputs": [1], "outputs": ["1"]}', "an input that is not text"),
        ('{"inputs": ["\\ud800"], "outputs": ["1"]}', "not valid Unicode"),
        ('{"inputs": ["1"], "outputs": ["1"], "time": 3}', "the unknown key 'time'"),
        ('{"inputs": ["1"], "outputs": ["1"], "fn_name": "f("}', "no name of a function"),
        ('{"inputs": ["x"], "outputs": ["1"], "fn_name": "f"}', "not JSON"),
        ('{"inputs": [{"a": 1}], "outputs": ["1"], "fn_name": "f"}', "no list of arguments"),
        ('{"inputs": ["1"], "outputs": ["1"], "assert_case": ["assert 1"]}', "both inputs and assert_case"),
        ('["x = 1"]', "its number 1"),
        ("[1]", "its number 1"),
        ('{"inputs": ["1"], "inputs": ["2"], "outputs": ["1"]}', "is not JSON"),
        (json.dumps({"inputs": ["[" * 100_000], "outputs": ["1"], "fn_name": "f"}), "nested too deeply"),
    ],
)
def test_a_ground_truth_without_usable_tests(text, message):
    with pytest.raises(CaseError, match=message):
        read_cases(text)


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ("1 2\n3\n", "1  2 \n3", True),
        ("1\n2", "1 2", False),
        ("1\n\n2", "1\n2", False),
        ("0.3333333", "0.33333331", True),
        ("1.0", "1", True),
        ("0.5", "0.6", False),
        ("07", "7", False),
        ("10000000000000001", "10000000000000000", False),
        ("yes", "YES", False),
        ("nan", "nan", True),
        ("e", "E", False),
        ("", "\n", True),
        ("1", "", False),
    ],
)
def test_outputs_are_compared_by_words(output, expected, same):
    assert same_text(output, expected) is same


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.integers() | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(VALUES)
def test_a_value_equals_itself_after_json(value):
    value = plain(value)
    assert same_value(json.loads(json.dumps(value)), value)


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("```python\na\n```\n```python\nb\n```\nSo:\n```\n3\n```", "b\n"),
        ("```\na\n```", "a\n"),
        ("```cpp\na\n```", None),
        ("```Python\na\n```", "a\n"),
        ("```py\na\n```", "a\n"),
        ("```python\na", None),
        ("a = 1", None),
        ("  ```python\n  a\n  ```", "  a\n"),
        ("", None),
    ],
)
def test_the_last_python_block_is_the_answer(text, block):
    assert last_python_block(text) == block
