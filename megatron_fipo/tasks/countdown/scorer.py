"""The reward function `countdown`: an exact verifier."""

from megatron_fipo.tasks.countdown.problems import CountdownProblem, evaluate, expressions, parse_expression
from megatron_fipo.tasks.task import NO_ANSWER, Completion, Problem, Reward, Score


def score_countdown(completion: Completion) -> Score:
    """1 if the response is not truncated and ends with a single `#` and a right expression, else 0.

    An expression `a?b?c` or `a?b?c?d`, ? one of + - *, is right if it has the problem's numbers in their order and its
    value, left to right, is the target. Attempts before the `#` are not checked. The answer for the majority
    vote is the value of a well-formed expression of these numbers, so different expressions with the same
    value vote together. Raises `ValueError` for a ground truth with a `countdown_obstacle`.
    """
    problem = completion.problem
    target = CountdownProblem.parse(problem.ground_truth)
    if target is None:
        raise ValueError(f"problem {problem.problem_id}: {problem.ground_truth!r} is not a countdown problem")
    _, separator, answer = completion.text.partition("#")
    expression = parse_expression(answer) if separator and completion.finish_reason == "stop" else None
    if expression is None or expression.numbers != target.numbers:
        return Score(reward=0.0, accuracy=0.0, answer=NO_ANSWER)
    value = evaluate(expression)
    correct = float(value == target.target)
    return Score(reward=correct, accuracy=correct, answer=str(value))


def countdown_obstacle(problem: Problem) -> str | None:
    """Why no response can be right for this ground truth; None if one can."""
    target = CountdownProblem.parse(problem.ground_truth)
    if target is None:
        return "is not a countdown problem of the form 3,7,5=26 (three or four digits from 1 to 9, a target from 1 to 99); write it so"
    if all(evaluate(expression) != target.target for expression in expressions(target.numbers)):
        return "has no solution; remove the problem"
    return None


COUNTDOWN_REWARD = Reward(score_countdown, countdown_obstacle, reads_columns=False)
"""The reward `countdown`."""
