"""Method choice: exact chains, one right method, disjoint sets, and a reward for the answer alone."""

import random
from dataclasses import replace

import numpy as np
import pytest

from examples.method_choice.task import METHODS, RESPONSES, SIZES, STEPS, Chain, imitated, rows, score
from megatron_fipo.tasks import Completion, Problem


@pytest.fixture(scope="module")
def sets():
    return {name: list(rows(name)) for name in SIZES}


def completion(row: dict, text: str) -> Completion:
    problem = Problem(
        "id", (), row["prompt"], row["reward_model"]["ground_truth"], "method_choice", columns=row
    )
    return Completion(problem, text, np.zeros(0, np.int32), "stop")


def written(row: dict, method: str) -> str:
    """A response without mistakes."""
    key, start = row["prompt"].split(":")
    values = Chain(int(key), tuple(map(int, start.split(",")))).values(method)
    return f"{method}{''.join(f'{value};' for value in values)}#{values[-1]}"


def test_the_right_method_is_the_only_one_that_is_right(sets):
    for row in sets["train"] + sets["held-out"]:
        right = [method for method in METHODS if score(completion(row, written(row, method))).accuracy]
        assert right == [row["method"]]


def test_a_method_is_its_recurrence():
    assert Chain(3, (7, 0, 2)).values("/")[:4] == [1, 1, 5, 2]
    for method, (a, b) in METHODS.items():
        x = [4, 9, 1, *Chain(0, (4, 9, 1)).values(method)]
        assert all(x[n] == (a * x[n - 1] + b * x[n - 3]) % 10 for n in range(3, STEPS + 3))


def test_the_sets_have_the_same_rows_on_every_call_and_no_start_in_common(sets):
    starts = {name: {row["prompt"].partition(":")[2] for row in found} for name, found in sets.items()}
    assert not starts["sft"] & starts["train"]
    assert not (starts["sft"] | starts["train"]) & starts["held-out"]
    for name, found in sets.items():
        assert found == list(rows(name))
        assert len(found) == SIZES[name] * RESPONSES.get(name, 1)
        assert len({row["prompt"] for row in found}) == SIZES[name]


def test_what_is_imitated_does_not_know_the_rule(sets):
    chosen = [row["response"][0] == row["method"] for row in sets["sft"]]
    assert np.mean(chosen) == pytest.approx(1 / len(METHODS), abs=0.02)
    accuracy = np.mean([score(completion(row, row["response"])).accuracy for row in sets["sft"]])
    assert 0.1 < accuracy < 0.25


def test_mistakes_are_as_frequent_as_stated_and_are_followed():
    rng, chain, wrong = random.Random(0), Chain(0, (4, 9, 1)), 0
    for _ in range(400):
        text = imitated(chain, rng)
        a, b = METHODS[text[0]]
        x = [4, 9, 1, *map(int, text[1:].partition("#")[0].split(";")[:-1])]
        wrong += sum(x[n] != (a * x[n - 1] + b * x[n - 3]) % 10 for n in range(3, STEPS + 3))
    assert wrong / (400 * STEPS) == pytest.approx(1 / 40, abs=0.005)


@pytest.mark.parametrize("change", ["", "x", ";", "#", "-"])
def test_another_form_is_no_answer(sets, change):
    row = sets["train"][0]
    text = written(row, row["method"])
    assert score(completion(row, text)).accuracy == 1
    found = score(completion(row, text + change if change else ""))
    assert (found.reward, found.accuracy) == (0, 0)
    assert score(replace(completion(row, text), text=f"{text[1:]}")).accuracy == 0


def test_the_choice_is_reported(sets):
    row = sets["train"][0]
    other = next(method for method in METHODS if method != row["method"])
    assert score(completion(row, written(row, row["method"]))).extra == {"right_method": 1.0}
    assert score(completion(row, written(row, other))).extra == {"right_method": 0.0}
