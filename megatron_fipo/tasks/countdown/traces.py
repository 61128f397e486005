"""Supervised traces of countdown, on which the base model is trained."""

import random
from dataclasses import dataclass

from megatron_fipo.tasks.countdown.problems import CountdownProblem, attempt, evaluate, expressions


@dataclass(frozen=True)
class TraceStyle:
    """How often the attempts of a trace are right, and how soon it gives up."""

    right_probability: float
    """Each attempt is right with this probability."""
    give_up_probabilities: tuple[float, float]
    """After a wrong attempt, a patient trace gives up with the first probability, an impatient one with the second."""
    patient_share: float = 0.5
    """The mixture gives RL a range of response lengths to select from."""
    most_wrong: int = 16
    """After so many wrong attempts comes the right one, so that no trace is longer than about 400 tokens."""


STYLES = {3: TraceStyle(0.25, (0.2, 0.6)), 4: TraceStyle(0.12, (0.06, 0.25))}
"""Styles by how many numbers the problem has. Of four numbers, fewer expressions are right, so patience has to be greater."""


def supervised_trace(problem: CountdownProblem, rng: random.Random, style: TraceStyle | None = None) -> str:
    """A response for the base model to imitate, without its end-of-sequence token; the style of `STYLES` if None.

    A trace that gives up answers with the expression that it tried last, which is wrong. No attempt is repeated.
    """
    style = style or STYLES[len(problem.numbers)]
    give_up = style.give_up_probabilities[0 if rng.random() < style.patient_share else 1]
    candidates = list(expressions(problem.numbers))
    rng.shuffle(candidates)
    right = [e for e in candidates if evaluate(e) == problem.target]
    wrong = [e for e in candidates if evaluate(e) != problem.target][: style.most_wrong]
    if not right:
        raise ValueError(f"countdown problem {problem} has no solution")
    trace = ""
    while wrong and rng.random() >= style.right_probability:
        tried = wrong.pop()
        trace += attempt(tried, problem.target)
        if rng.random() < give_up:
            return f"{trace}#{tried}"
    return f"{trace}{attempt(right[0], problem.target)}#{right[0]}"
