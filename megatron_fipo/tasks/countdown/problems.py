"""The problems of countdown, and the data source `countdown`."""

import hashlib
import random
import re
from dataclasses import dataclass
from functools import cache
from itertools import combinations_with_replacement, permutations, product

from megatron_fipo.config import Config
from megatron_fipo.errors import UserError
from megatron_fipo.tasks.task import DataSource, EncodePrompt, Problem

Numbers = tuple[int, ...]
"""Three or four numbers from 1 to 9."""

OPERATORS = "+-*"
HELD_OUT_SHARE = 0.1
"""Share of the problems that are used for evaluation only."""


@dataclass(frozen=True)
class Expression:
    """`a?b?c` or `a?b?c?d`, evaluated left to right."""

    numbers: Numbers
    operators: tuple[str, ...]

    def __str__(self) -> str:
        first, *others = self.numbers
        return f"{first}" + "".join(
            f"{operator}{number}" for operator, number in zip(self.operators, others, strict=True)
        )


@dataclass(frozen=True)
class CountdownProblem:
    numbers: Numbers
    target: int

    def __str__(self) -> str:
        return f"{','.join(map(str, self.numbers))}={self.target}"

    @property
    def prompt(self) -> str:
        return f"{self}:"

    @classmethod
    def parse(cls, text: str) -> "CountdownProblem | None":
        """The problem written as `3,7,5=26` or `3,7,5,2=52`; None if `text` is not of this form."""
        match = re.fullmatch(r"([1-9](?:,[1-9]){2,3})=([1-9][0-9]?)", text, re.ASCII)
        if match is None:
            return None
        numbers, target = match.groups()
        return cls(tuple(map(int, numbers.split(","))), int(target))


def parse_expression(text: str) -> Expression | None:
    """The expression that the complete `text` is; None if it is not one."""
    if re.fullmatch(r"[1-9](?:[-+*][1-9]){2,3}", text, re.ASCII) is None:
        return None
    return Expression(tuple(map(int, text[::2])), tuple(text[1::2]))


def _apply(left: int, operator: str, right: int) -> int:
    if operator == "+":
        return left + right
    return left - right if operator == "-" else left * right


def _values(expression: Expression) -> list[int]:
    """The value after each operator, left to right, without operator precedence."""
    value, *others = expression.numbers
    values = []
    for operator, number in zip(expression.operators, others, strict=True):
        value = _apply(value, operator, number)
        values.append(value)
    return values


def evaluate(expression: Expression) -> int:
    """The value, left to right, without operator precedence."""
    return _values(expression)[-1]


def attempt(expression: Expression, target: int) -> str:
    """The expression evaluated and compared with the target: `3*7=21+5=26-26=0;`."""
    values = _values(expression)
    steps = zip(expression.operators, expression.numbers[1:], values, strict=True)
    work = "".join(f"{operator}{number}={value}" for operator, number, value in steps)
    return f"{expression.numbers[0]}{work}-{target}={values[-1] - target};"


def _orders(numbers: Numbers) -> list[Numbers]:
    """The numbers in every distinct order; the list does not depend on the order given."""
    return sorted(set(permutations(numbers)))


@cache
def expressions(numbers: Numbers) -> tuple[Expression, ...]:
    """The expressions with the numbers in this order: 9 with three numbers, 27 with four."""
    return tuple(Expression(numbers, operators) for operators in product(OPERATORS, repeat=len(numbers) - 1))


def _reachable(numbers: Numbers) -> set[int]:
    """The targets that some expression with the numbers in this order has."""
    values = {numbers[0]}
    for number in numbers[1:]:
        values = {_apply(value, operator, number) for value in values for operator in OPERATORS}
    return {value for value in values if 1 <= value <= 99}


def _is_held_out(numbers: Numbers, target: int) -> bool:
    digest = hashlib.sha256(f"{sorted(numbers)}={target}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


def generate_problems(size: int, *, numbers: int = 3, held_out: bool, seed: int) -> list[CountdownProblem]:
    """`size` distinct solvable problems of so many numbers, held out or for training; equal arguments give equal lists.

    Whether a problem is held out depends only on its sorted numbers and its target. Every problem occurs once
    before any occurs again with its numbers in another order. Raises `UserError` if there are fewer than
    `size` problems.
    """
    rng = random.Random(f"countdown {held_out} {seed}")
    orders_of: dict[tuple[Numbers, int], list[Numbers]] = {}
    for chosen in combinations_with_replacement(range(1, 10), numbers):
        for order in _orders(chosen):
            for target in _reachable(order):
                if _is_held_out(chosen, target) == held_out:
                    orders_of.setdefault((chosen, target), []).append(order)
    ranked: list[tuple[int, float, CountdownProblem]] = []
    for (_, target), orders in sorted(orders_of.items()):
        rng.shuffle(orders)
        ranked += [(nth, rng.random(), CountdownProblem(order, target)) for nth, order in enumerate(orders)]
    if size > len(ranked):
        key = "evaluation_size" if held_out else "train_size"
        raise UserError(f"data.{key} is {size} but countdown has {len(ranked)} such problems; lower it")
    ranked.sort(key=lambda item: item[:2])
    return [problem for _, _, problem in ranked[:size]]


def _problems(config: Config, encode: EncodePrompt, *, held_out: bool) -> list[Problem]:
    data = config.data
    size = data.evaluation_size if held_out else data.train_size
    problems = []
    for problem in generate_problems(size, numbers=data.numbers, held_out=held_out, seed=config.seed):
        text, prompt_ids = encode(f"countdown problem {problem}", problem.prompt)
        problems.append(
            Problem(str(problem), prompt_ids, text, ground_truth=str(problem), data_source="countdown")
        )
    return problems


COUNTDOWN = DataSource(
    training=lambda config, encode, _: _problems(config, encode, held_out=False),
    held_out=lambda config, encode, _: {"countdown": _problems(config, encode, held_out=True)},
)
"""The data source `countdown`: problems are generated, so nothing is logged."""
