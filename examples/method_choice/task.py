"""A task in which the first token decides the rest: choose one of four methods, then follow it for 24 steps.

    prompt     3:7,0,2                     a key and three digits
    response   /1;1;5;2;...;8;#8           a method, 24 values, and the last value again

Every value follows from earlier ones by the method, modulo 10. The key decides which method is right, by a rule that no prompt
states: key 0 is +, 1 is -, 2 is *, 3 is /, 4 is + again. No other method ends in the value of the right
one, so a wrong first token makes the answer wrong, unless a mistake corrects it.

The responses that the base model imitates choose their method at random, and one in 40 of their steps is wrong. So it is right in
about 15 % of its responses, and there are two things to learn from the reward: the rule, by the first token, and care, by all others.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_fipo.tasks import NO_ANSWER, Completion, Score

STEPS = 24
METHODS = {"+": (1, 1), "-": (1, 9), "*": (3, 1), "/": (1, 7)}
"""Method: (a, b) of value n = a * value n-1 + b * value n-3 mod 10. Each b has an inverse, so no mistake is forgotten."""
SIZES = {"sft": 2000, "train": 1000, "held-out": 150}
"""Problems of each set. No start occurs in two of them."""
RESPONSES = {"sft": 5}
"""Rows of each problem, with different responses; otherwise one."""
SUMS = {"sft": range(4), "train": range(4, 8), "held-out": range(8, 10)}
"""The set of a problem, by the sum of its three digits mod 10."""
WRONG_STEPS = 1 / 40
"""Share of wrong steps in the responses to imitate."""

_RESPONSE = re.compile(rf"[-+*/](?:\d;){{{STEPS}}}#(\d)")


@dataclass(frozen=True)
class Chain:
    key: int
    start: tuple[int, int, int]

    @property
    def prompt(self) -> str:
        return f"{self.key}:{','.join(map(str, self.start))}"

    @property
    def method(self) -> str:
        """The right one."""
        return list(METHODS)[self.key % len(METHODS)]

    @property
    def answer(self) -> int:
        """The last value of the right method."""
        return self.values(self.method)[-1]

    def values(self, method: str, mistakes: random.Random | None = None) -> list[int]:
        """All that follow the start. From 7, 0, 2 the method `/` makes 2 + 7 * 7 = 51 → 1, then 1 + 7 * 0 → 1, then 1 + 7 * 2 → 5.

        With `mistakes`, WRONG_STEPS of them are wrong, and later values follow from those.
        """
        a, b = METHODS[method]
        values = list(self.start)
        for _ in range(STEPS):
            value = a * values[-1] + b * values[-3]
            if mistakes is not None and mistakes.random() < WRONG_STEPS:
                value += mistakes.randrange(1, 10)
            values.append(value % 10)
        return values[3:]


def rows(name: str) -> Iterator[dict[str, object]]:
    """The rows of a set of `SIZES`, the same on every call: `data.source` of `train` and `sft`, which read what they need of them."""
    rng = random.Random(f"method choice {name}")
    for chain in list(chains(name, rng)) * RESPONSES.get(name, 1):
        yield {
            "prompt": chain.prompt,
            "response": imitated(chain, rng),
            "reward_model": {"ground_truth": str(chain.answer)},
            "method": chain.method,
            "data_source": "method_choice",
            "extra_info": {"index": chain.prompt},
        }


def chains(name: str, rng: random.Random) -> Iterator[Chain]:
    """Different problems of a set."""
    found: set[Chain] = set()
    while len(found) < SIZES[name]:
        first, second, total = rng.randrange(10), rng.randrange(10), rng.choice(SUMS[name])
        chain = Chain(rng.randrange(10), (first, second, (total - first - second) % 10))
        ends = [chain.values(method)[-1] for method in METHODS]
        if ends.count(chain.answer) == 1 and chain not in found:
            found.add(chain)
            yield chain


def imitated(chain: Chain, rng: random.Random) -> str:
    """A response with a method at random and a few wrong steps."""
    method = rng.choice(list(METHODS))
    values = chain.values(method, rng)
    return f"{method}{''.join(f'{value};' for value in values)}#{values[-1]}"


def score(completion: Completion) -> Score:
    """1 if the response has the form above and ends in the value of the right method, else 0. How it got there does not count."""
    found = _RESPONSE.fullmatch(completion.text)
    right = found is not None and found[1] == completion.problem.ground_truth
    chosen = completion.text[:1] == completion.problem.columns["method"]
    answer = found[1] if found else NO_ANSWER
    return Score(float(right), float(right), answer, extra={"right_method": float(chosen)})
