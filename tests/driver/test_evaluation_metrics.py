"""Evaluation metrics against counting by hand and by enumeration."""

from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.driver.evaluation_metrics import (
    EvaluatedResponse,
    consensus,
    evaluation_values,
    over_sets,
    pass_at,
)
from megatron_fipo.tasks.task import NO_ANSWER


def response(answer="1", accuracy=0.0, length=10, truncated=False):
    return EvaluatedResponse(answer, accuracy, length, truncated)


def test_two_problems_by_hand():
    problems = [
        [
            response("7", 1.0, 10),
            response("7", 1.0, 20),
            response("3", 0.0, 30),
            response(NO_ANSWER, 0.0, 100, truncated=True),
        ],
        [response("5", 0.0, 40), response("5", 0.0, 50), response("5", 0.0, 60), response("8", 1.0, 70)],
    ]
    assert evaluation_values(problems) == {
        "avg_at_k": 3 / 8,
        "cons_at_k": 1 / 2,
        "pass_at_k": 1.0,
        "length_q25": 27.5,
        "length_mean": 47.5,
        "length_median": 45.0,
        "length_q75": 62.5,
        "truncated": 1 / 8,
        "k": 4.0,
        "problems": 2.0,
    }


@given(st.integers(1, 7), st.data())
def test_pass_at_n_is_the_share_of_subsets_with_a_right_response(k, data):
    right, n = data.draw(st.integers(0, k)), data.draw(st.integers(1, k))
    outcomes = [True] * right + [False] * (k - right)
    assert pass_at(n, k, right) == pytest.approx(
        np.mean([any(subset) for subset in combinations(outcomes, n)])
    )


def test_impossible_estimates_are_refused():
    for n, k, right in [(0, 4, 1), (5, 4, 1), (1, 4, 5), (1, 4, -1)]:
        with pytest.raises(ValueError, match="cannot be estimated"):
            pass_at(n, k, right)


def test_a_tie_is_worth_its_mean_in_every_order():
    tied = [
        response("a", 1.0),
        response("b", 0.0),
        response("c", 0.0),
        response("a", 1.0),
        response("b", 0.0),
    ]
    assert {consensus(order) for order in permutations(tied)} == {0.5}


def test_responses_without_an_answer_do_not_vote():
    assert consensus([response(NO_ANSWER), response(NO_ANSWER), response("a", 1.0)]) == 1.0
    assert consensus([response(NO_ANSWER), response(NO_ANSWER)]) == 0.0


def test_unequal_or_missing_responses_are_refused():
    refused: list[list[list[EvaluatedResponse]]] = [[], [[]], [[response()], [response(), response()]]]
    for problems in refused:
        with pytest.raises(ValueError, match="same number of responses"):
            evaluation_values(problems)


@given(
    st.dictionaries(
        st.text("abc", min_size=1),
        st.lists(st.lists(st.booleans(), min_size=2, max_size=2), min_size=1, max_size=5),
        min_size=1,
        max_size=4,
    )
)
def test_an_evaluation_has_the_values_of_each_set_and_their_mean_in_any_order(sets):
    values = {
        name: evaluation_values(
            [[response(accuracy=float(right)) for right in problem] for problem in problems]
        )
        | {"failed": 1.0}
        for name, problems in sets.items()
    }
    found = over_sets(values)
    for name, one in values.items():
        assert {key: found[f"evaluation/{name}/{key}"] for key in one} == one
    same_k = len({one["k"] for one in values.values()}) == 1
    of_k = {"cons_at_k", "pass_at_k", "k"}
    assert {metric for metric in of_k if f"evaluation/{metric}" in found} == (of_k if same_k else set())
    for metric in ("avg_at_k", *(sorted(of_k) if same_k else ()), "length_mean", "truncated"):
        assert found[f"evaluation/{metric}"] == pytest.approx(
            np.mean([one[metric] for one in values.values()])
        )
    assert found["evaluation/problems"] == sum(map(len, sets.values()))
    assert found["evaluation/failed"] == len(sets)
    assert over_sets(dict(reversed(values.items()))) == found
    if len(sets) == 1:
        (one,) = values.values()
        assert found["evaluation/avg_at_k"] == one["avg_at_k"]


def test_named_numbers_are_means_over_the_responses_that_have_them():
    def named(**extra):
        return EvaluatedResponse("1", 1.0, 10, False, extra)

    values = evaluation_values(
        [[named(tests=1, note="x", flag=True), named(tests=2.0)], [named(), named(a=-1)]]
    )
    assert (values["tests"], values["a"]) == (1.5, -1.0)
    assert not {"note", "flag"} & set(values)
    assert over_sets({"math": values | {"failed": 0.0}})["evaluation/math/tests"] == 1.5
