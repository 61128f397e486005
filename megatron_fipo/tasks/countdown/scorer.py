"""Exact verifier of the countdown task (`tasks/countdown/problems.py`)."""

from megatron_fipo.errors import UserError
from megatron_fipo.tasks.countdown.problems import CountdownProblem, evaluate, parse_expression
from megatron_fipo.tasks.problem import Problem
from megatron_fipo.tasks.score import NO_ANSWER, Score


def score_countdown(response_text: str, problem: Problem, finish_reason: str) -> Score:
    """1 if the response ends by itself in one `#` and an expression that is right, else 0.

    Right: `a?b?c` with ? of + - *, evaluated left to right, has the problem's numbers in their order and gives the target.
    Attempts before the `#` are not judged. The answer that votes is the value of a well-formed expression over these
    numbers, so that different ways to the target vote together.
    Raises UserError only for a problem whose ground truth is no countdown problem.
    """
    target = CountdownProblem.parse(problem.ground_truth)
    if target is None:
        raise UserError(
            f"problem {problem.problem_id} has the ground truth {problem.ground_truth!r}; reward.name=countdown needs 3,7,5=26"
        )
    _, separator, answer = response_text.partition("#")
    expression = parse_expression(answer) if separator and finish_reason == "stop" else None
    if expression is None or expression.numbers != target.numbers:
        return Score(reward=0.0, accuracy=0.0, answer=NO_ANSWER)
    value = evaluate(expression)
    correct = float(value == target.target)
    return Score(reward=correct, accuracy=correct, answer=str(value))
