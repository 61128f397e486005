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

Numbers = tuple[int, int, int]

OPERATORS = "+-*"
HELD_OUT_SHARE = 0.1
"""Share of the problems that are used for evaluation only."""


@dataclass(frozen=True)
class Expression:
    """`a?b?c`, evaluated left to right."""

    numbers: Numbers
    operators: tuple[str, str]

    def __str__(self) -> str:
        (a, b, c), (first, second) = self.numbers, self.operators
        return f"{a}{first}{b}{second}{c}"


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
        """The problem written as `3,7,5=26`; None if `text` is not of this form."""
        match = re.fullmatch(r"([1-9]),([1-9]),([1-9])=([1-9][0-9]?)", text, re.ASCII)
        if match is None:
            return None
        a, b, c, target = map(int, match.groups())
        return cls((a, b, c), target)


def parse_expression(text: str) -> Expression | None:
    """The expression that the complete `text` is; None if it is not one."""
    match = re.fullmatch(r"([1-9])([-+*])([1-9])([-+*])([1-9])", text, re.ASCII)
    if match is None:
        return None
    a, first, b, second, c = match.groups()
    return Expression((int(a), int(b), int(c)), (first, second))


def _apply(left: int, operator: str, right: int) -> int:
    if operator == "+":
        return left + right
    return left - right if operator == "-" else left * right


def _first_step(expression: Expression) -> int:
    return _apply(expression.numbers[0], expression.operators[0], expression.numbers[1])


def evaluate(expression: Expression) -> int:
    """The value, left to right, without operator precedence."""
    return _apply(_first_step(expression), expression.operators[1], expression.numbers[2])


def attempt(expression: Expression, target: int) -> str:
    """The expression evaluated and compared with the target: `3*7=21+5=26-26=0;`."""
    (a, b, c), (first, second) = expression.numbers, expression.operators
    value = evaluate(expression)
    return f"{a}{first}{b}={_first_step(expression)}{second}{c}={value}-{target}={value - target};"


def _orders(numbers: Numbers) -> list[Numbers]:
    """The numbers in every distinct order; the list does not depend on the order given."""
    return sorted(set(permutations(numbers)))  # type: ignore[arg-type]


@cache
def expressions(numbers: Numbers) -> tuple[Expression, ...]:
    """The nine expressions with the numbers in this order."""
    return tuple(Expression(numbers, (first, second)) for first, second in product(OPERATORS, repeat=2))


def _is_held_out(numbers: Numbers, target: int) -> bool:
    digest = hashlib.sha256(f"{sorted(numbers)}={target}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


def generate_problems(size: int, *, held_out: bool, seed: int) -> list[CountdownProblem]:
    """`size` distinct solvable problems, held out or for training; equal arguments give equal lists.

    Whether a problem is held out depends only on its sorted numbers and its target. Every problem occurs once
    before any occurs again with its numbers in another order. Raises `UserError` if there are fewer than
    `size` problems.
    """
    rng = random.Random(f"countdown {held_out} {seed}")
    orders_of: dict[tuple[Numbers, int], list[Numbers]] = {}
    for numbers in combinations_with_replacement(range(1, 10), 3):
        for order in _orders(numbers):
            for target in {value for e in expressions(order) if 1 <= (value := evaluate(e)) <= 99}:
                if _is_held_out(numbers, target) == held_out:
                    orders_of.setdefault((numbers, target), []).append(order)
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
    size, seed = config.data.evaluation_size if held_out else config.data.train_size, config.seed
    problems = []
    for problem in generate_problems(size, held_out=held_out, seed=seed):
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
