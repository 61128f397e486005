"""The JSON that a judge gets and gives. Pure.

{"problem": {"id", "prompt", "ground_truth", "data_source", "columns"}, "responses": [{"text", "finish_reason"}]}
{"scores": [number or {"reward", "accuracy", "answer", "extra"}]}
"""

import json
import math
from collections.abc import Sequence
from typing import Any

from megatron_fipo.tasks import strict_json
from megatron_fipo.tasks.named_numbers import is_finite_number
from megatron_fipo.tasks.task import NO_ANSWER, Completion, Score

_KEYS = {"reward", "accuracy", "answer", "extra"}


class InvalidAnswerError(ValueError):
    """An answer of a judge that is no list of scores. The message is the end of a sentence about it, without its content."""


def request_body(completions: Sequence[Completion]) -> bytes:
    """The request for the scores of responses to one problem."""
    problem = completions[0].problem
    message = {
        "problem": {
            "id": problem.problem_id,
            "prompt": problem.prompt_text,
            "ground_truth": problem.ground_truth,
            "data_source": problem.data_source,
            "columns": {name: _json_value(value) for name, value in problem.columns.items()},
        },
        "responses": [
            {"text": completion.text, "finish_reason": completion.finish_reason} for completion in completions
        ],
    }
    return json.dumps(message, allow_nan=False).encode()


def _json_value(value: Any) -> Any:
    """A value of a row as JSON: numbers that are not finite are null, dates and other types text."""
    if isinstance(value, dict):
        return {str(name): _json_value(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def read_scores(body: bytes, count: int) -> list[float | Score]:
    """The scores of `count` responses. Raises `InvalidAnswerError`."""
    try:
        message = strict_json.loads(body.decode())
    except ValueError:
        raise InvalidAnswerError("is not JSON") from None
    scores = message.get("scores") if isinstance(message, dict) else None
    if not isinstance(scores, list):
        raise InvalidAnswerError("has no list `scores`")
    if len(scores) != count:
        raise InvalidAnswerError(f"has {len(scores)} scores for {count} responses")
    return [_score(number, score) for number, score in enumerate(scores, start=1)]


def _score(number: int, score: Any) -> float | Score:
    if is_finite_number(score):
        return float(score)
    if not isinstance(score, dict) or not is_finite_number(score.get("reward")):
        raise InvalidAnswerError(f"has no finite reward in its score {number}")
    if unknown := sorted(score.keys() - _KEYS):
        raise InvalidAnswerError(f"has the unknown key {unknown[0][:40]!a} in its score {number}")
    reward = float(score["reward"])
    accuracy = score.get("accuracy", float(reward > 0))
    answer, extra = score.get("answer", NO_ANSWER), score.get("extra", {})
    if accuracy not in (0, 1) or not isinstance(answer, str) or not isinstance(extra, dict):
        raise InvalidAnswerError(f"has an accuracy, answer or extra of another type in its score {number}")
    return Score(reward, float(accuracy), answer, extra)
