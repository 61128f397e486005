"""An evaluation excludes and counts what could not be sampled or scored, and asks for the scores of the rest only."""

from collections.abc import Mapping, Sequence

import pytest

from megatron_fipo.config import EvaluationConfig, EvaluationSet
from megatron_fipo.driver.evaluation import Evaluation, evaluate
from megatron_fipo.engine.protocol import SamplingParams
from megatron_fipo.errors import UserError
from megatron_fipo.scorer.protocol import ScoreRequest
from megatron_fipo.tasks.task import Problem, Score, TaskSettings
from tests.generations import generation

K = 2


def evaluated(sets: Mapping[str, Sequence[str]]) -> tuple[Evaluation, list[str]]:
    """Problems named by what happens to them, and those that were scored."""
    problems = [name for names in sets.values() for name in names]
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
        lambda groups: [
            None if problems[index // K] == "lost" and index % K else generation((index,), (0.0,), "stop", 0)
            for index in range(sum(len(group.requests) for group in groups))
        ],
        score,
        {
            name: [Problem(problem, (1,), "prompt", "truth", "test") for problem in names]
            for name, names in sets.items()
        },
        lambda ids: f"text {ids.tolist()}",
        EvaluationConfig(samples_per_problem=K),
        max_new_tokens=9,
        seed=1,
    )
    return evaluation, asked


def test_problems_without_all_responses_or_scores_are_excluded_and_counted():
    evaluation, asked = evaluated({"one": ["wrong", "lost", "right", "unscored", "right"]})
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
def test_a_set_of_which_nothing_is_evaluated_is_an_error(problems):
    with pytest.raises(
        UserError, match=rf"every one of the {len(problems)} problems of the evaluation set bad"
    ):
        evaluated({"good": ["right"], "bad": problems})


def test_each_set_has_its_metrics_and_the_mean_weights_sets_and_not_problems():
    evaluation, _ = evaluated({"small": ["right", "lost"], "large": ["wrong", "wrong", "wrong", "right"]})
    values = evaluation.values
    assert [values[f"evaluation/{name}avg_at_k"] for name in ("small/", "large/", "")] == [1.0, 0.25, 0.625]
    assert [values[f"evaluation/{name}problems"] for name in ("small/", "large/", "")] == [1, 4, 5]
    assert [values[f"evaluation/{name}failed"] for name in ("small/", "large/", "")] == [1, 0, 1]
    assert [row["set"] for row in evaluation.table] == ["small"] * K + ["large"] * 4 * K


def test_the_seeds_of_a_set_do_not_depend_on_the_other_sets():
    def seeds(sets):
        asked = []

        def generate(groups):
            requests = [request for group in groups for request in group.requests]
            asked.extend(requests)
            return [generation((1,), (0.0,), "stop", 0) for _ in requests]

        problems = {name: [Problem(p, (1,), "prompt", "truth", "test") for p in "ab"] for name in sets}
        score = lambda requests: [[Score(1.0, 1.0, "1")] * K for _ in requests]  # noqa: E731
        evaluate(
            generate, score, problems, str, EvaluationConfig(samples_per_problem=K), max_new_tokens=9, seed=1
        )
        assert len({request.request_id for request in asked}) == len(asked)
        return [request.seed for request in asked]

    alone, both = seeds(["b"]), seeds(["a", "b"])
    assert both[2 * K :] == alone
    assert len({*alone}) == len(alone)


def test_each_set_is_sampled_by_its_own_settings_and_k_is_averaged_only_if_it_is_the_same():
    settings = EvaluationConfig(
        sets={
            "greedy": EvaluationSet("a", samples_per_problem=1, temperature=0.0, top_p=1.0),
            "plain": EvaluationSet("b"),
        },
        samples_per_problem=3,
        temperature=0.7,
        top_p=0.9,
    )
    short = TaskSettings(set_name="greedy", max_response_length=5)
    sets = {
        "greedy": [Problem(name, (1,), "prompt", "truth", "test", task=short) for name in "ab"],
        "plain": [Problem("c", (1,), "prompt", "truth", "test")],
    }
    seen = []

    def generate(groups):
        seen.extend((group.problem.problem_id, len(group.requests), group.sampling) for group in groups)
        return [generation((1,), (0.0,), "stop", 0) for group in groups for _ in group.requests]

    def score(requests):
        return [[Score(1.0, 1.0, "1") for _ in request.responses] for request in requests]

    values = evaluate(generate, score, sets, str, settings, max_new_tokens=9, seed=1).values
    greedy, plain = SamplingParams(0.0, 1.0, 5), SamplingParams(0.7, 0.9, 9)
    assert seen == [("a", 1, greedy), ("b", 1, greedy), ("c", 3, plain)]
    assert (values["evaluation/greedy/k"], values["evaluation/plain/k"]) == (1.0, 3.0)
    assert values["evaluation/avg_at_k"] == 1.0
    assert not {"evaluation/k", "evaluation/pass_at_k", "evaluation/cons_at_k"} & values.keys()
