"""What `check-task` shows and reads: sets of problems, responses to score, and their scores as text of 80 columns. Pure."""

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_fipo.errors import UserError
from megatron_fipo.scorer.protocol import Failure
from megatron_fipo.tasks import strict_json
from megatron_fipo.tasks.named_numbers import named_numbers
from megatron_fipo.tasks.task import HeldOut, Problem, Score

WIDTH = 80
LABEL = 14
"""Columns of the names on the left."""
MOST_LINES = 30
"""Of a prompt or a response."""
MOST_CHARACTERS = WIDTH * MOST_LINES
"""Of a text that is shown, and of the ground truth in a made-up response: unit tests may take megabytes."""
TRAINING = "training"
"""Name of the training set in a file of responses, if it has no other."""


@dataclass(frozen=True)
class ProblemSet:
    """The problems of a set, in the order of its file."""

    name: str
    problems: Sequence[Problem]

    def lines(self) -> Iterator[str]:
        """What it is."""
        tokens = [len(problem.prompt_ids) for problem in self.problems]
        rewards = sorted({problem.task.reward for problem in self.problems})
        yield from _wrapped(
            f"{self.name}: {len(self.problems):,} problems, prompts of {min(tokens):,} to {max(tokens):,} tokens (mean "
            f"{sum(tokens) / len(tokens):,.0f}), reward {', '.join(rewards)}"
        )


@dataclass(frozen=True)
class Shown:
    """A problem to show, and responses to score."""

    of_set: ProblemSet
    index: int
    responses: tuple[str, ...]

    @property
    def problem(self) -> Problem:
        return self.of_set.problems[self.index]

    def lines(self) -> Iterator[str]:
        """The problem as the model gets it."""
        problem = self.problem
        source = f"data_source {problem.data_source}, " if problem.data_source else ""
        yield from _wrapped(
            f"{self.of_set.name}, row {self.index + 1} of {len(self.of_set.problems):,}: problem {problem.problem_id}, "
            f"{source}{len(problem.prompt_ids):,} tokens"
        )
        yield from _labelled("prompt", problem.prompt_text)
        yield from _labelled("ground truth", problem.ground_truth)


def problem_sets(train: Sequence[Problem], held_out: HeldOut) -> list[ProblemSet]:
    """The sets of a task; those of training first."""
    by_name: dict[str, list[Problem]] = {}
    for problem in train:
        by_name.setdefault(problem.task.set_name, []).append(problem)
    training = [ProblemSet(name or TRAINING, problems) for name, problems in by_name.items()]
    return training + [ProblemSet(f"evaluation {name}", problems) for name, problems in held_out.items()]


def first_rows(sets: Sequence[ProblemSet], rows: int) -> list[Shown]:
    """The first rows of each set, each with two made-up responses: the ground truth as an answer, and none."""
    return [
        Shown(each, index, (f"Answer: {problem.ground_truth[:MOST_CHARACTERS]}", "I do not know."))
        for each in sets
        for index, problem in enumerate(each.problems[:rows])
    ]


def given_responses(lines: Iterable[str], file: str, sets: Sequence[ProblemSet]) -> list[Shown]:
    """The problems that a file of responses names, in its order, each once with all its responses.

    A line is a JSON object with `response`, `problem_id` or `row` (from 1), and `set` if a set other than the first with
    this problem is meant. Raises `UserError` with the line for any other.
    """
    responses: dict[tuple[str, int], list[str]] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            row = _row(line, f"{file}, line {number}")
            responses.setdefault(_find(row, f"{file}, line {number}", sets), []).append(row["response"])
    if not responses:
        raise UserError(f"{file} has no responses; write lines such as {EXAMPLE}")
    by_name = {each.name: each for each in sets}
    return [Shown(by_name[name], index, tuple(texts)) for (name, index), texts in responses.items()]


EXAMPLE = '{"problem_id": "q1", "response": "Answer: 34"}'


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = strict_json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}); write it as {EXAMPLE}") from None
    if not isinstance(row, dict) or not isinstance(row.get("response"), str):
        raise UserError(f"{where} has no text `response`; write it as {EXAMPLE}")
    if any("\ud800" <= character <= "\udfff" for character in row["response"]):
        raise UserError(f"{where} has a response that is not valid Unicode (half of a character); correct it")
    if ("problem_id" in row) == ("row" in row):
        raise UserError(f"{where} needs one of `problem_id` and `row`; write it as {EXAMPLE}")
    return row


def _find(row: Mapping[str, Any], where: str, sets: Sequence[ProblemSet]) -> tuple[str, int]:
    """Set and index of the problem that a line names."""
    names = [each.name for each in sets]
    if row.get("set", names[0]) not in names:
        raise UserError(f"{where} names the set {row['set']!r}; use one of {', '.join(map(repr, names))}")
    searched = [each for each in sets if row.get("set", each.name) == each.name]
    if "row" in row:
        index = row["row"]
        rows = len(searched[0].problems)
        if type(index) is not int or not 1 <= index <= rows:
            raise UserError(f"{where} has the row {index!r}; {searched[0].name} has the rows 1 to {rows:,}")
        return searched[0].name, index - 1
    for each in searched:
        for index, problem in enumerate(each.problems):
            if problem.problem_id == str(row["problem_id"]):
                return each.name, index
    raise UserError(
        f"{where} names the problem {row['problem_id']!r}, which no set has; check the id or give `row`"
    )


def response_lines(number: int, text: str) -> Iterator[str]:
    """A response as the reward function gets it."""
    yield from _labelled(f"response {number}", text or "(empty)")


def score_lines(score: Score, seconds: float) -> Iterator[str]:
    """A response's score; `seconds` is the time per response."""
    numbers = "".join(f", {name} {value:g}" for name, value in named_numbers(score.extra).items())
    yield from _labelled(
        "",
        f"reward {score.reward:g}, accuracy {score.accuracy:g}, answer {score.answer!r}{numbers}, "
        f"{1000 * seconds:.1f} ms",
    )


def failure_lines(failure: Failure) -> Iterator[str]:
    """Why a response could not be scored, and the traceback of the user's code, whose lines stay as they are."""
    yield from _labelled("FAILED", failure.reason)
    yield from (f"  {line}" for line in failure.trace.splitlines())


def summary(scores: Sequence[Score], failures: int) -> Iterator[str]:
    """The last lines."""
    if scores:
        reward = sum(score.reward for score in scores) / len(scores)
        right = sum(score.accuracy > 0 for score in scores)
        yield f"scored {len(scores)} responses: mean reward {reward:g}, {right} right"
    if failures:
        yield f"responses that could not be scored: {failures}"


def _labelled(label: str, text: str) -> Iterator[str]:
    """A text with a name on the left, its own line breaks kept; long texts are cut."""
    width = WIDTH - LABEL - 2
    lines = [
        part
        for line in text[:MOST_CHARACTERS].splitlines() or [""]
        for part in textwrap.wrap(line, width, drop_whitespace=False, replace_whitespace=False) or [""]
    ]
    if len(lines) > MOST_LINES:
        lines = lines[: MOST_LINES - 1]
        left = len(text) - sum(map(len, lines))
        lines.append(f"... (about {left:,} more characters)")
    for index, line in enumerate(lines):
        yield f"  {label if index == 0 else '':{LABEL}}{line.expandtabs()}".rstrip()


def _wrapped(text: str) -> Iterator[str]:
    yield from textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
