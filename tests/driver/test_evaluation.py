"""An evaluation excludes and counts what could not be sampled or scored, and asks for the scores of the rest only."""

from collections.abc import Sequence

import pytest

from megatron_fipo.config import EvaluationConfig
from megatron_fipo.driver.evaluation import Evaluation, evaluate
from megatron_fipo.errors import UserError
from megatron_fipo.scorer.protocol import ScoreRequest
from megatron_fipo.tasks.task import Problem, Score
from tests.generations import generation

K = 2


def evaluated(problems: Sequence[str]) -> tuple[Evaluation, list[str]]:
    """Problems named by what happens to them, and those that were scored."""
    asked: list[str] = []

    def score(requests: Sequence[ScoreRequest]) -> list[list[Score] | None]:
        asked.extend(request.problem.problem_id for request in requests)
        assert all(len(request.responses) == K for request in requests)
        return [
            None
            if request.problem.problem_id == "unscored"
            else [Score(1.0, float(request.problem.problem_id == "right"), str(i)) for i in range(K)]
            for request in requests
        ]

    evaluation = evaluate(
        lambda requests, _: [
            None if problems[index // K] == "lost" and index % K else generation((index,), (0.0,), "stop", 0)
            for index in range(len(requests))
        ],
        score,
        [Problem(name, (1,), "prompt", "truth", "test") for name in problems],
        lambda ids: f"text {ids.tolist()}",
        EvaluationConfig(samples_per_problem=K),
        max_new_tokens=9,
        seed=1,
    )
    return evaluation, asked


def test_problems_without_all_responses_or_scores_are_excluded_and_counted():
    evaluation, asked = evaluated(["wrong", "lost", "right", "unscored", "right"])
    assert asked == ["wrong", "right", "unscored", "right"]
    assert evaluation.values["evaluation/failed"] == 2
    assert evaluation.values["evaluation/problems"] == 3
    assert evaluation.values["evaluation/avg_at_k"] == pytest.approx(2 / 3)
    rows = [(row["problem_id"], row["response"], row["answer"]) for row in evaluation.table]
    assert rows == [
        ("wrong", "text [0]", "0"),
        ("wrong", "text [1]", "1"),
        ("right", "text [4]", "0"),
        ("right", "text [5]", "1"),
        ("right", "text [8]", "0"),
        ("right", "text [9]", "1"),
    ]


@pytest.mark.parametrize("problems", [["lost"], ["unscored"], ["lost", "unscored"]])
def test_nothing_evaluated_is_an_error(problems):
    with pytest.raises(UserError, match=rf"every one of the {len(problems)} evaluation problems"):
        evaluated(problems)
