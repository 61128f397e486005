"""What arms write before and after training: responses to the first held-out problems, chosen by their place alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_fipo.study.compare import Variant
from megatron_fipo.study.evaluations import Problem, Response
from megatron_fipo.study.results import ACCURACY, Result

Evaluations = Callable[[Result, int], Sequence[Response] | None]
"""The responses of a run's evaluation; None if they are not known."""
PROBLEMS = 5
HEAD, TAIL = 1_200, 400
"""Characters shown of a longer response: its first and its last ones."""


@dataclass(frozen=True)
class Sample:
    """The first response of a run to a held-out problem, at its first and its last evaluation."""

    arm: str
    seed: int
    problem: Problem
    iterations: tuple[int, int]
    before: Response
    after: Response


def choose_samples(variants: Sequence[Variant], evaluations: Evaluations) -> list[Sample]:
    """Of the lowest seed of each variant, the first `PROBLEMS` problems of its first evaluation.

    By problem, then by variant. Runs without tables have none.
    """
    tasks = len({variant.task for variant in variants})
    of_variants = [
        _of_run(f"{variant.task}: {variant.label}" if tasks > 1 else variant.label, variant, evaluations)
        for variant in variants
        if variant.results
    ]
    return [found[i] for i in range(PROBLEMS) for found in of_variants if i < len(found)]


def _of_run(arm: str, variant: Variant, evaluations: Evaluations) -> list[Sample]:
    result = min(variant.results, key=lambda result: result.seed)
    iterations = sorted(result.series(ACCURACY))
    if len(iterations) < 2:
        return []
    ends = (iterations[0], iterations[-1])
    before, after = (_first_responses(evaluations(result, iteration) or ()) for iteration in ends)
    return [
        Sample(arm, result.seed, problem, ends, before[problem], after[problem])
        for problem in list(before)[:PROBLEMS]
        if problem in after
    ]


def _first_responses(responses: Sequence[Response]) -> dict[Problem, Response]:
    first: dict[Problem, Response] = {}
    for response in responses:
        first.setdefault(response.problem, response)
    return first


def samples_markdown(samples: Sequence[Sample]) -> str:
    """A section per problem, with the prompt, the right answer, and for each arm the responses before and after."""
    parts = []
    for number, problem in enumerate(dict.fromkeys(sample.problem for sample in samples), 1):
        *_, prompt, answer = map(str, problem)
        parts += [f"## Problem {number}", _block(prompt), "The right answer:", _block(answer)]
        for sample in samples:
            if sample.problem == problem:
                ends = zip(sample.iterations, (sample.before, sample.after), strict=True)
                parts += [part for end in ends for part in _response(sample, *end)]
    return "\n\n".join(parts) + "\n" if parts else "No complete run has tables of its evaluations.\n"


def _response(sample: Sample, iteration: int, response: Response) -> tuple[str, str]:
    verdict = "right" if response.right else "wrong"
    head = f"{sample.arm}, seed {sample.seed}, after {iteration} iterations: {verdict}, {response.length:,.0f} tokens"
    return head, _block(response.text)


def _block(text: str) -> str:
    """A code block, with a fence that no line of the text can close."""
    if len(text) > HEAD + TAIL:
        hidden = len(text) - HEAD - TAIL
        text = f"{text[:HEAD]}\n… {hidden:,} characters not shown …\n{text[-TAIL:]}"
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"
