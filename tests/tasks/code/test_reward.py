"""The reward `code` on responses."""

import json
from dataclasses import replace

import numpy as np
import pytest

from megatron_fipo.config import CodeReward, RewardConfig
from megatron_fipo.tasks.code.reward import CodeTests, code_obstacle
from megatron_fipo.tasks.rewards import load_terms
from megatron_fipo.tasks.task import NO_ANSWER, Completion, Problem

DOUBLED = {"inputs": ["1\n", "2\n", "3\n"], "outputs": ["2\n", "4\n", "6\n"]}


def completion(source, truth=DOUBLED, finish="stop"):
    problem = Problem("p", (1,), "double", json.dumps(truth), "code")
    return Completion(problem, f"So:\n```python\n{source}\n```\n", np.zeros(1, np.int32), finish)


@pytest.fixture(scope="module")
def tests():
    scorer = CodeTests(RewardConfig(timeout_s=60.0, code=CodeReward(modules=())))
    yield scorer
    scorer.close()


def partial(tests):
    settings = replace(tests.settings, code=replace(tests.settings.code, partial=True))
    other = CodeTests(settings)
    other.close()
    other._sandbox = tests._sandbox
    return other


def test_all_tests_must_pass(tests):
    right = tests.score(completion("print(2 * int(input()))"))
    assert (right.reward, right.accuracy) == (1.0, 1.0)
    assert right.answer == "print(2 * int(input()))\n"
    assert right.extra == {"tests": 3, "tests_passed": 3, "timed_out": 0.0}
    wrong = tests.score(completion("n = int(input())\nprint(2 * n if n != 2 else 5)"))
    assert (wrong.reward, wrong.accuracy, wrong.extra["tests_passed"]) == (0.0, 0.0, 1)


def test_a_share_of_the_tests(tests):
    score = partial(tests).score(completion("n = int(input())\nprint(2 * n if n != 2 else 5)"))
    assert (score.reward, score.accuracy, score.extra["tests_passed"]) == (pytest.approx(2 / 3), 0.0, 2)


def test_a_response_without_a_block_has_no_answer(tests):
    score = tests.score(replace(completion(""), text="print(2)"))
    assert (score.reward, score.answer) == (0.0, NO_ANSWER)


def test_functions_and_assertions(tests):
    function = {"inputs": [[[1, 2]]], "outputs": [3], "fn_name": "total"}
    assert tests.score(completion("def total(a): return sum(a)", function)).reward == 1.0
    assertions = ["assert total([1, 2]) == 3", "assert not total([])"]
    assert tests.score(completion("def total(a): return sum(a)", assertions)).reward == 1.0
    equal = "class E:\n def __eq__(self, other): return True\ndef total(a): return E()"
    assert tests.score(completion(equal, assertions)).reward == 0.0
    number = "class E(int):\n def __eq__(self, other): return True\ndef total(a): return E(9)"
    assert tests.score(completion(number, assertions)).reward == 0.0


def test_expected_outputs_are_not_in_the_process_of_an_answer(tests):
    search = """
import gc, re, sys
frame, found = sys._getframe(), []
while frame:
    found.append(repr(frame.f_locals)); frame = frame.f_back
for item in gc.get_objects():
    try: found.append(repr(item)[:10000])
    except Exception: pass
matches = [match for text in found if (match := re.search('the-exp[e]cted-output', text))]
print(matches[0][0] if matches else 'none')
"""
    for output in ("the-expected-output", "none"):
        score = tests.score(completion(search, {"inputs": [""], "outputs": [output]}))
        assert score.reward == float(output == "none")


def test_an_answer_does_not_find_the_one_before_or_its_output(tests):
    """The answers to a problem are run one after the other: a copy of an output would be rewarded."""
    truth = {"inputs": ["1"], "outputs": ["earlier-output"]}
    copy = """
import re, sys
frame, found = sys._getframe().f_back, []
while frame:
    found += map(repr, frame.f_locals.values()); frame = frame.f_back
matches = [match for text in found if (match := re.search('earlier-outp[u]t', text))]
print(matches[0][0] if matches else 'none')
"""
    for source, reward in (("print('earlier-output')", 1.0), (copy, 0.0)):
        assert tests.score(completion(source, truth)).reward == reward


def test_the_tests_of_a_response_share_its_time():
    tests = CodeTests(RewardConfig(timeout_s=1.0, code=CodeReward(partial=True, modules=())))
    tests.check()
    score = tests.score(completion("import time\ntime.sleep(0.6 if input() != '1' else 0)\nprint(2)"))
    tests.close()
    assert score.extra["timed_out"] == 1.0
    assert score.accuracy == 0.0


def test_a_sandbox_that_is_lost_between_tests_costs_nothing(tests):
    tests._sandbox._process.kill()
    assert tests.score(completion("print(2 * int(input()))")).reward == 1.0


def test_the_reward_by_its_name():
    (term,) = load_terms("code", ".", RewardConfig())
    assert term.reward.obstacle(completion("").problem) is None
    assert term.reward.obstacle(replace(completion("").problem, ground_truth="34")) is not None
    assert (
        code_obstacle(replace(completion("").problem, ground_truth="34"))
        == "is JSON, but no object or list of assertions"
    )
    assert not term.reward.reads_columns
