"""Supervised traces of countdown, on which the base model is trained."""

import random

from megatron_fipo.tasks.countdown.problems import CountdownProblem, attempt, evaluate, expressions


def supervised_trace(
    problem: CountdownProblem,
    rng: random.Random,
    *,
    right_probability: float = 0.25,
    patient_share: float = 0.5,
    give_up_probabilities: tuple[float, float] = (0.2, 0.6),
) -> str:
    """A response for the base model to imitate, without its end-of-sequence token.

    Each attempt is right with `right_probability`. After a wrong attempt, a patient trace gives up with the
    first of `give_up_probabilities`, an impatient one with the second, and answers with the wrong expression.
    No attempt is repeated. The mixture gives RL a range of response lengths to select from.
    """
    give_up = give_up_probabilities[0 if rng.random() < patient_share else 1]
    candidates = list(expressions(problem.numbers))
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
