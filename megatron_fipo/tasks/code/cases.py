"""The tests of a problem, read from its ground truth, and whether an output is the expected one. Pure.

{"inputs": [text, ...], "outputs": [text, ...]}                   programs: standard input and output
{"inputs": [...], "outputs": [...], "fn_name": name}              a function: arguments and result
{"assert_case": ["assert f(1) == 2", ...]}  or the list alone     assertions about one
"""

import ast
import json
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from megatron_fipo.tasks import strict_json
from megatron_fipo.tasks.code.child.values import plain

TOLERANCE = 1e-6
"""Relative and absolute, of numbers with a decimal point or exponent."""
_KEYS = {"inputs", "outputs", "fn_name", "assert_case"}


class CaseError(ValueError):
    """A ground truth without usable tests. The message is the end of a sentence about it."""


@dataclass(frozen=True)
class Case:
    """One test."""

    given: bytes
    """Standard input, or the JSON list of a function's arguments."""
    call: dict[str, Any] | None
    """What `Sandbox.run` calls; None for a program."""
    expected: Any
    """Text of a program; else a value as `values.plain` gives it."""
    wrapped: bool = False
    """The expected value may also be the only one in its list."""

    @property
    def output_bytes(self) -> int:
        """Size of the expected output."""
        return len(str(self.expected))

    def passed(self, output: bytes) -> bool:
        """Whether this is the output of a right answer."""
        text = output.decode(errors="replace")
        if self.call is None:
            return same_text(text, self.expected)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return False
        if same_value(value, self.expected):
            return True
        return self.wrapped and same_value(value, self.expected[0])


@lru_cache(maxsize=2)
def read_cases(ground_truth: str) -> tuple[Case, ...]:
    """The tests. Raises `CaseError`."""
    try:
        truth = strict_json.loads(ground_truth)
    except ValueError:
        raise CaseError('is not JSON; store {"inputs": [...], "outputs": [...]}') from None
    if isinstance(truth, list):
        truth = {"assert_case": truth}
    if not isinstance(truth, dict):
        raise CaseError("is JSON, but no object or list of assertions")
    if unknown := sorted(truth.keys() - _KEYS):
        raise CaseError(
            f"has the unknown key {unknown[0]!a}; its keys are inputs, outputs, fn_name, assert_case"
        )
    if truth.get("assert_case") is not None:
        if truth.get("inputs") or truth.get("outputs"):
            raise CaseError("has both inputs and assert_case; store one of them")
        cases = [_assertion(number, text) for number, text in enumerate(_list(truth, "assert_case"), start=1)]
    else:
        cases = _pairs(truth)
    if not cases:
        raise CaseError("has no test")
    return tuple(cases)


def _pairs(truth: dict[str, Any]) -> list[Case]:
    inputs, outputs, name = _list(truth, "inputs"), _list(truth, "outputs"), truth.get("fn_name")
    if len(inputs) != len(outputs):
        raise CaseError(f"has {len(inputs)} inputs and {len(outputs)} outputs")
    if name is None:
        texts = [
            (_text(given, "input"), _text(expected, "output"))
            for given, expected in zip(inputs, outputs, strict=True)
        ]
        return [Case(given.encode(), None, expected) for given, expected in texts]
    if not (isinstance(name, str) and name.isidentifier()):
        raise CaseError("has an fn_name that is no name of a function")
    return [_call(name, given, expected) for given, expected in zip(inputs, outputs, strict=True)]


def _call(name: str, given: Any, expected: Any) -> Case:
    """A test of a function: JSON text with one argument per line, or a list of them; JSON text of the result, or the value."""
    try:
        arguments = (
            [json.loads(line) for line in given.split("\n") if line.strip()]
            if isinstance(given, str)
            else given
        )
        result = json.loads(expected) if isinstance(expected, str) else expected
        value = [plain(item) for item in result] if isinstance(result, list) else plain(result)
    except ValueError:
        raise CaseError("has an input or output of a function that is not JSON") from None
    except RecursionError:
        raise CaseError("has an input or output of a function that is nested too deeply") from None
    if not isinstance(arguments, list):
        raise CaseError("has an input of a function that is no list of arguments")
    # Published sets have the result alone, or a list of this one result.
    wrapped = not isinstance(expected, str) and isinstance(result, list) and len(result) == 1
    return Case(json.dumps(arguments).encode(), {"function": name}, value, wrapped)


def _assertion(number: int, text: Any) -> Case:
    """`assert EXPRESSION == LITERAL`: the expression is evaluated in the sandbox, and compared outside it."""
    try:
        statements = ast.parse(text if isinstance(text, str) else "").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        statements = []
    statement = statements[0] if len(statements) == 1 else None
    if isinstance(statement, ast.Assert):
        test, expected = statement.test, True
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            return Case(b"[]", {"expression": f"bool({ast.unparse(test.operand)})"}, False)
        if not isinstance(test, ast.Compare):
            return Case(b"[]", {"expression": f"bool({ast.unparse(test)})"}, expected)
        if len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq | ast.Is):
            try:
                value = plain(_literal(test.comparators[0]))
            except (ValueError, TypeError, RecursionError, MemoryError):
                pass
            else:
                return Case(b"[]", {"expression": ast.unparse(test.left)}, value)
    raise CaseError(
        f"has an assertion that is not of the form `assert EXPRESSION == LITERAL`, its number {number}"
    )


def _literal(node: ast.expr) -> Any:
    """The value of a literal, or of `set(literal)`. Raises ValueError."""
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("set", "frozenset")
    ):
        if node.keywords or len(node.args) > 1:
            raise ValueError
        return set(ast.literal_eval(node.args[0])) if node.args else set()
    return ast.literal_eval(node)


def _list(truth: dict[str, Any], key: str) -> list[Any]:
    value = truth.get(key)
    if not isinstance(value, list):
        raise CaseError(f"has no list {key}")
    return value


def _text(value: Any, what: str) -> str:
    """Text, or a list of its lines."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        value = "\n".join(value)
    if not isinstance(value, str):
        raise CaseError(f"has an {what} that is not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise CaseError(f"has an {what} that is not valid Unicode") from None
    return value


# -- comparison


def same_text(output: str, expected: str) -> bool:
    """Whether two outputs have the same words in each line, apart from empty lines at start and end.

    Words are what blanks separate; they are compared as text, or as numbers if one has a decimal point or exponent.
    """
    given, wanted = _lines(output), _lines(expected)
    return given == wanted or (len(given) == len(wanted) and all(map(_same_line, given, wanted)))


def _lines(text: str) -> list[list[str]]:
    """The words of each line, without empty lines at start and end."""
    return [line.split() for line in text.strip().splitlines()]


def _same_line(output: list[str], expected: list[str]) -> bool:
    return len(output) == len(expected) and all(map(_same_word, output, expected))


def _same_word(output: str, expected: str) -> bool:
    if output == expected:
        return True
    if not any(mark in word for word in (output, expected) for mark in ".eE"):
        return False  # 07 is not 7, and large integers are not rounded
    try:
        return _close(float(output), float(expected))
    except ValueError:
        return False


def same_value(value: Any, expected: Any) -> bool:
    """Whether two values of JSON are equal, numbers with a decimal point within the tolerance."""
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(same_value, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        return value.keys() == expected.keys() and all(same_value(value[key], expected[key]) for key in value)
    if isinstance(value, float) or isinstance(expected, float):
        numbers = isinstance(value, int | float) and isinstance(expected, int | float)
        try:
            return numbers and _close(float(value), float(expected))
        except OverflowError:
            return False
    return value == expected


def _close(value: float, expected: float) -> bool:
    return math.isclose(value, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
