"""Countdown: whether the attempt that a token belongs to, and the attempt after that, reach the target."""

from collections.abc import Sequence

import numpy as np

from megatron_fipo.tasks.countdown.problems import CountdownProblem, attempt, evaluate, expressions

THIS, NEXT = "the attempt of the token reaches the target", "the next attempt reaches the target"
END = ";"
"""The last character of an attempt."""


def outcomes(prompt: str, tokens: Sequence[str]) -> dict[str, np.ndarray]:
    """1 or 0 per token of a response, given as texts, for `THIS` and `NEXT`; NaN without such an attempt.

    An attempt ends with its `;`. It reaches the target if it is, character by character, the right evaluation of an expression
    with the problem's numbers in their order and the target's value: an error in the arithmetic counts as a miss. The answer
    after the last attempt belongs to none. All NaN if the prompt is not a problem such as `3,7,5=26:`, or if a token has
    several characters.
    """
    this, following = np.full(len(tokens), np.nan), np.full(len(tokens), np.nan)
    problem = CountdownProblem.parse(prompt.removesuffix(":"))
    if problem is None or any(len(token) > 1 for token in tokens):
        return {THIS: this, NEXT: following}
    right = {
        attempt(expression, problem.target)
        for expression in expressions(problem.numbers)
        if evaluate(expression) == problem.target
    }
    ends = [index + 1 for index, token in enumerate(tokens) if token == END]
    starts = [0, *ends[:-1]]
    reached = [float("".join(tokens[start:end]) in right) for start, end in zip(starts, ends, strict=False)]
    for index, (start, end) in enumerate(zip(starts, ends, strict=False)):
        this[start:end] = reached[index]
        if index + 1 < len(reached):
            following[start:end] = reached[index + 1]
    return {THIS: this, NEXT: following}
