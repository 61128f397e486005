"""Write the word problems of this example:  .venv/bin/python examples/smollm-math/make_data.py runs/smollm-math-data

sft.jsonl        problems with a written solution, to teach the form of an answer
train.jsonl      problems for reinforcement learning
held-out.jsonl   problems that are only evaluated

Rows are those of DAPO's training file, in DAPO's prompt; the column `response` is the written solution. No template occurs with the
same numbers in two of the files. The same seed gives the same bytes.
"""

import argparse
import hashlib
import json
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from templates import BOXES, NAMES, ONE_STEP, THINGS, TWO_STEPS, Template

from megatron_fipo.tasks.published.forms import TEMPLATE_HEAD, TEMPLATE_TAIL

FILES = {"sft": 1000, "train": 2000, "held-out": 100}
"""Rows of each file."""
SHARES = {"sft": 40, "train": 85, "held-out": 100}
"""Upper bounds of a hash of template and numbers, from 0 to 99, that decides the file of a problem."""
LARGEST = 150
"""Largest result of a step."""

_STEP = re.compile(r"<<(\w+)([-+*/])(\w+)>>")


@dataclass(frozen=True)
class WordProblem:
    question: str
    solution: str
    answer: int
    file: str
    """The one of `FILES` that it belongs to."""

    @property
    def row(self) -> dict[str, object]:
        """As a row of DAPO's file, with the written solution."""
        return {
            "data_source": "word_problems",
            "prompt": [{"role": "user", "content": f"{TEMPLATE_HEAD}{self.question}{TEMPLATE_TAIL}"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": str(self.answer), "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": hashlib.blake2b(self.question.encode(), digest_size=8).hexdigest()},
            "response": f"{self.solution}\nAnswer: {self.answer}",
        }


def problems(seed: int) -> Iterator[WordProblem]:
    """An endless stream, half of one step and half of two or three."""
    rng = random.Random(f"word problems {seed}")
    while True:
        template = rng.choice(rng.choice((ONE_STEP, TWO_STEPS)))
        solved = None
        while solved is None:
            numbers = {letter: rng.randint(*bounds) for letter, bounds in template.ranges.items()}
            solved = solve(template, numbers)
        steps, answer = solved
        values = {**_words(rng), **numbers}
        yield WordProblem(
            template.question.format(**values), steps.format(**values), answer, file_of(template, numbers)
        )


def _words(rng: random.Random) -> dict[str, str]:
    name, other = rng.sample(NAMES, 2)
    box, boxes = rng.choice(BOXES)
    return {"name": name, "other": other, "things": rng.choice(THINGS), "box": box, "boxes": boxes}


def solve(template: Template, numbers: dict[str, int]) -> tuple[str, int] | None:
    """The solution with its steps calculated, and the answer; None unless each result is an integer from 1 to `LARGEST`."""
    values, results = dict(numbers), []

    def step(match: re.Match[str]) -> str:
        left, right = (int(part) if part.isdigit() else values.get(part, 0) for part in match.group(1, 3))
        result = calculate(left, match[2], right)
        results.append(result)
        values[f"r{len(results)}"] = result or 0
        return f"{left} {match[2]} {right} = {result}"

    text = _STEP.sub(step, template.solution)
    if any(result is None or not 1 <= result <= LARGEST for result in results):
        return None
    return text, results[-1] or 0


def calculate(left: int, operator: str, right: int) -> int | None:
    """The exact result; None if a division leaves a remainder."""
    if operator == "/":
        return left // right if right and left % right == 0 else None
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def file_of(template: Template, numbers: dict[str, int]) -> str:
    """The file that a template with these numbers belongs to, whatever its names and things: the same on every machine."""
    key = f"{template.question} {sorted(numbers.items())}".encode()
    bucket = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) % 100
    return next(name for name, bound in SHARES.items() if bucket < bound)


def generate(seed: int) -> dict[str, list[WordProblem]]:
    """The problems of each file, all with different questions."""
    files: dict[str, list[WordProblem]] = {name: [] for name in FILES}
    seen: set[str] = set()
    for problem in problems(seed):
        file = files[problem.file]
        if len(file) < FILES[problem.file] and problem.question not in seen:
            seen.add(problem.question)
            file.append(problem)
        if all(len(files[name]) == count for name, count in FILES.items()):
            return files
    raise AssertionError("the stream is endless")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("target", type=Path, metavar="FOLDER", help="folder of the three files")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    arguments.target.mkdir(parents=True, exist_ok=True)
    for name, rows in generate(arguments.seed).items():
        path = arguments.target / f"{name}.jsonl"
        path.write_text("".join(f"{json.dumps(problem.row)}\n" for problem in rows))
        print(f"{path}: {len(rows)} problems")
    return 0


if __name__ == "__main__":
    sys.exit(main())
