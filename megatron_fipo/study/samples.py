"""What arms write before and after training: responses to the first held-out problems, chosen by their place alone."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from megatron_fipo.study.compare import Variant
from megatron_fipo.study.evaluations import Problem, Response
from megatron_fipo.study.results import ACCURACY, Result
from megatron_fipo.study.table import markdown_text

Evaluations = Callable[[Result, int], Iterable[Response]]
"""The responses of a run's evaluation; none if they are not known."""
PROBLEMS = 5
HEAD, TAIL = 1_200, 400
"""Characters shown of a longer response: its first and its last ones."""
_LEAST_HIDDEN = 100
NOTHING = "No seed is complete in all arms with tables of its first and last evaluation.\n"


@dataclass(frozen=True)
class Sample:
    """The first response of an arm to a problem, after the iterations of its first and of its last evaluation."""

    arm: str
    seed: int
    ends: tuple[tuple[int, Response], ...]


@dataclass(frozen=True)
class Section:
    """A problem, and what each arm of a task wrote."""

    task: str
    problem: Problem
    samples: list[Sample]


def choose_samples(variants: Sequence[Variant], evaluations: Evaluations) -> list[Section]:
    """Of each task the first `PROBLEMS` problems that all its arms have, with the lowest seed that is complete in all.

    Arms without a complete run or without tables are left out.
    """
    sections = []
    for task in dict.fromkeys(variant.task for variant in variants):
        of_task = [variant for variant in variants if variant.task == task and variant.results]
        seeds = set.intersection(*(set(variant.seeds) for variant in of_task)) if of_task else set()
        if seeds:
            sections += _sections(task, of_task, min(seeds), evaluations)
    return sections


def _sections(task: str, variants: Sequence[Variant], seed: int, evaluations: Evaluations) -> list[Section]:
    found = [
        (variant.label, _ends(result, evaluations))
        for variant in variants
        for result in variant.results
        if result.seed == seed
    ]
    tables = [(arm, ends) for arm, ends in found if ends and all(ends.values())]
    if not tables:
        return []
    first = next(iter(tables[0][1].values()))
    shared = [
        problem for problem in first if all(problem in end for _, ends in tables for end in ends.values())
    ]
    return [
        Section(
            task,
            problem,
            [Sample(arm, seed, tuple((i, end[problem]) for i, end in ends.items())) for arm, ends in tables],
        )
        for problem in shared[:PROBLEMS]
    ]


def _ends(result: Result, evaluations: Evaluations) -> dict[int, dict[Problem, Response]]:
    """The first response to each problem, after the iterations of the first and of the last evaluation."""
    iterations = sorted(result.series(ACCURACY))
    if len(iterations) < 2:
        return {}
    ends: dict[int, dict[Problem, Response]] = {}
    for iteration in (iterations[0], iterations[-1]):
        responses = ends.setdefault(iteration, {})
        for response in evaluations(result, iteration):
            responses.setdefault(response.problem, response)
    return ends


def samples_markdown(sections: Sequence[Section]) -> str:
    """A section per problem, with the prompt, the right answer, and for each arm the responses before and after."""
    tasks = len({section.task for section in sections}) > 1
    parts = []
    for number, section in enumerate(sections, 1):
        *_, prompt, answer = section.problem
        of_task = f", {markdown_text(section.task)}" if tasks else ""
        parts += [f"## Problem {number}{of_task}", _block(prompt), "The right answer:", _block(answer)]
        for sample in section.samples:
            for iteration, response in sample.ends:
                verdict = "right" if response.right else "wrong"
                parts.append(
                    f"{markdown_text(sample.arm)}, seed {sample.seed}, after {iteration} iterations: {verdict}, "
                    f"{response.length:,.0f} tokens"
                )
                parts.append(_block(response.text))
    return "\n\n".join(parts) + "\n" if parts else NOTHING


def _block(text: str) -> str:
    """A code block, with a fence that no line of the text can close, and what a terminal would not show as escapes."""
    hidden = len(text) - HEAD - TAIL
    if hidden > _LEAST_HIDDEN:
        text = f"{text[:HEAD]}\n… {hidden:,} characters not shown …\n{text[-TAIL:]}"
    text = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"
