"""Evaluation metrics against counting by hand and by enumeration."""

from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.driver.evaluation_metrics import EvaluatedResponse, consensus, evaluation_values, pass_at
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
