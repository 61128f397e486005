"""Countdown by search in the open: a task on which two CPU cores can watch reinforcement learning lengthen reasoning.

A problem is three numbers (1-9) and a target (1-99): combine the numbers, in the order given, with + - *, strictly left to
right, so that `3+7*5` is (3+7)*5 = 50. The prompt is `3,7,5=26:`. A response makes attempts such as `3*7=21+5=26-26=0;`, each of
which works an expression out and takes the target from it, so that 0 means found. It ends with `#` and the chosen expression.
The base model learns from traces that often give up early, so length is a free choice that reward can change.
"""

import hashlib
import random
import re
from dataclasses import dataclass
from functools import cache
from itertools import combinations_with_replacement, permutations, product

from megatron_fipo.errors import UserError

Numbers = tuple[int, int, int]

OPERATORS = "+-*"
HELD_OUT_SHARE = 0.1
"""Share of the problems that only evaluation sees."""


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
        """The problem that `3,7,5=26` spells, or None."""
        match = re.fullmatch(r"([1-9]),([1-9]),([1-9])=([1-9][0-9]?)", text, re.ASCII)
        if match is None:
            return None
        a, b, c, target = map(int, match.groups())
        return cls((a, b, c), target)


def parse_expression(text: str) -> Expression | None:
    """The expression that `text` spells, all of it, or None."""
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
    """The expression worked out and compared with the target: `3*7=21+5=26-26=0;`."""
    (a, b, c), (first, second) = expression.numbers, expression.operators
    value = evaluate(expression)
    return f"{a}{first}{b}={_first_step(expression)}{second}{c}={value}-{target}={value - target};"


def _orders(numbers: Numbers) -> list[Numbers]:
    """The numbers in every different order; the same list for every order given."""
    return sorted(set(permutations(numbers)))  # type: ignore[arg-type]


@cache
def _expressions(numbers: Numbers) -> tuple[Expression, ...]:
    """The nine expressions over the numbers in this order."""
    return tuple(Expression(numbers, (first, second)) for first, second in product(OPERATORS, repeat=2))


def _is_held_out(numbers: Numbers, target: int) -> bool:
    digest = hashlib.sha256(f"{sorted(numbers)}={target}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


def generate_problems(size: int, *, held_out: bool, seed: int) -> list[CountdownProblem]:
    """`size` different solvable problems of one split; the same arguments always give the same list.

    Which split a problem belongs to depends on its sorted numbers and target alone. Every problem comes once before any
    comes again with its numbers in another order. Raises UserError if the split is smaller than `size`.
    """
    rng = random.Random(f"countdown {held_out} {seed}")
    orders_of: dict[tuple[Numbers, int], list[Numbers]] = {}
    for numbers in combinations_with_replacement(range(1, 10), 3):
        for order in _orders(numbers):
            for target in {value for e in _expressions(order) if 1 <= (value := evaluate(e)) <= 99}:
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


def supervised_trace(
    problem: CountdownProblem,
    rng: random.Random,
    *,
    right_probability: float = 0.25,
    patient_share: float = 0.5,
    give_up_probabilities: tuple[float, float] = (0.2, 0.6),
) -> str:
    """A response for the base model to imitate, without its end-of-sequence token.

    Each attempt is right with `right_probability`; after a wrong one a patient trace gives up with the first of
    `give_up_probabilities`, an impatient one with the second, and answers with the wrong attempt. No attempt is repeated.
    The mixture leaves reinforcement learning a spread of lengths to select from.
    """
    give_up = give_up_probabilities[0 if rng.random() < patient_share else 1]
    candidates = list(_expressions(problem.numbers))
    rng.shuffle(candidates)
    right = [e for e in candidates if evaluate(e) == problem.target]
    wrong = [e for e in candidates if evaluate(e) != problem.target]
    if not right:
        raise ValueError(f"countdown problem {problem} has no solution")
    trace = ""
    while wrong and rng.random() >= right_probability:
        tried = wrong.pop()
        trace += attempt(tried, problem.target)
        if rng.random() < give_up:
            return f"{trace}#{tried}"
    return f"{trace}{attempt(right[0], problem.target)}#{right[0]}"
