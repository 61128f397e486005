r"""The reward function `math_verify`: mathematical equality by the library math-verify (extra `math`).

`1/2`, `0.5` and `\frac{1}{2}` are equal. The library's own limits of time use SIGALRM, as a scorer's do: they are switched
off, and the scorer's limit (`reward.timeout_s`) ends an expression that takes too long.
"""

import logging
from functools import lru_cache
from typing import Any

from megatron_fipo.errors import UserError
from megatron_fipo.tasks.task import NO_ANSWER, Completion, Problem, Reward, Score

SEARCHED_CHARACTERS = 1000
"""The answer must be within the last characters of the response."""


def score_math_verify(completion: Completion) -> Score:
    r"""1 if the last answer of the response (`\boxed{}`, other LaTeX, or a plain expression) equals the ground truth, else 0.

    Of several boxes the last counts; the library would take them for one set of answers.
    Raises `ValueError` for a ground truth that the library cannot read.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    truth = _truth(completion.problem.ground_truth)
    targets = [LatexExtractionConfig(), ExprExtractionConfig()]
    text = completion.text[max(completion.text.rfind("\\boxed"), 0) :]
    found = parse(text, targets, parsing_timeout=None)
    if not found:
        return Score(reward=0.0, accuracy=0.0, answer=NO_ANSWER)
    correct = float(verify(list(truth), found, timeout_seconds=None))
    read = str(found[-1])  # the expressions come first, then the text that was read
    return Score(reward=correct, accuracy=correct, answer=read)


@lru_cache(maxsize=256)
def _truth(ground_truth: str) -> tuple[Any, ...]:
    """The ground truth as expressions, read once for all responses to its problem."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    found = parse(f"\\boxed{{{ground_truth}}}", [LatexExtractionConfig()], parsing_timeout=None) or parse(
        ground_truth, [LatexExtractionConfig(), ExprExtractionConfig()], parsing_timeout=None
    )
    if not found:
        raise ValueError(f"math-verify reads no value in the ground truth {ground_truth!r:.60}")
    return tuple(found)


def math_verify_obstacle(problem: Problem) -> str | None:
    """Why no response can be right for this ground truth; None if one may. Reading it takes some ms, too long for all rows."""
    return None if problem.ground_truth.strip() else "is empty; store the value"


def math_verify_reward() -> Reward:
    """The reward `math_verify`. Imports the library; raises `UserError` if it is not installed."""
    try:
        import math_verify  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"the reward math_verify needs the library math-verify ({error}); install it on every node: "
            "pip install 'megatron-fipo[math]'"
        ) from error
    # It warns that its limits of time are off, and logs each expression that it cannot compare.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    return Reward(
        score_math_verify, math_verify_obstacle, reads_last=SEARCHED_CHARACTERS, reads_columns=False
    )
