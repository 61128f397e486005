"""Countdown: solvable problems, disjoint training and held-out sets, stable generation, valid traces, and a
tokenizer that AutoTokenizer loads.
"""

import json
import random
import re
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron_fipo.errors import UserError
from megatron_fipo.tasks.countdown.problems import (
    CountdownProblem,
    Expression,
    attempt,
    evaluate,
    generate_problems,
    parse_expression,
)
from megatron_fipo.tasks.countdown.scorer import score_countdown
from megatron_fipo.tasks.countdown.tokenizer import CHARACTERS, build_tokenizer, save_tokenizer
from megatron_fipo.tasks.countdown.traces import STYLES, TraceStyle, supervised_trace
from megatron_fipo.tasks.task import Problem
from tests.completions import scored

TRAIN = generate_problems(4000, held_out=False, seed=1)
HELD_OUT = generate_problems(150, held_out=True, seed=1)
FOUR = generate_problems(4000, numbers=4, held_out=False, seed=1)
FOUR_HELD_OUT = generate_problems(150, numbers=4, held_out=True, seed=1)
SEARCH = TraceStyle(0.0, (0.0, 0.0))


def accuracy(problem: CountdownProblem, response: str) -> float:
    return scored(score_countdown, response, Problem("", (), "", str(problem), "")).accuracy


def parsed(text: str) -> Expression:
    expression = parse_expression(text)
    assert expression is not None
    return expression


def test_expressions_are_worked_out_left_to_right():
    expression = Expression((3, 7, 5), ("*", "+"))
    assert (str(expression), evaluate(expression)) == ("3*7+5", 26)
    assert attempt(expression, 26) == "3*7=21+5=26-26=0;"
    assert evaluate(parsed("3+7*5")) == 50
    assert attempt(parsed("3-7*5"), 7) == "3-7=-4*5=-20-7=-27;"
    assert attempt(parsed("3*7+5*2"), 40) == "3*7=21+5=26*2=52-40=12;"


def test_problems_are_what_the_task_says():
    for count, problem in [(3, p) for p in TRAIN + HELD_OUT] + [(4, p) for p in FOUR + FOUR_HELD_OUT]:
        assert len(problem.numbers) == count
        assert all(1 <= number <= 9 for number in problem.numbers)
        assert 1 <= problem.target <= 99
        assert accuracy(problem, supervised_trace(problem, random.Random(0), SEARCH)) == 1.0  # solvable
        assert CountdownProblem.parse(str(problem)) == problem
    assert re.fullmatch(r"\d,\d,\d=\d{1,2}:", TRAIN[0].prompt)
    assert re.fullmatch(r"\d,\d,\d,\d=\d{1,2}:", FOUR[0].prompt)


@pytest.mark.parametrize("numbers", [3, 4])
def test_no_problem_is_in_both_splits_whatever_the_seed_or_the_order_of_numbers(numbers):
    def keys(problems):
        return {(tuple(sorted(p.numbers)), p.target) for p in problems}

    for seed in (1, 2):
        assert not keys(generate_problems(4000, numbers=numbers, held_out=False, seed=seed)) & keys(
            generate_problems(450, numbers=numbers, held_out=True, seed=3)
        )
    assert len(keys(HELD_OUT)) == 150  # no problem twice in another order while unused ones are left
    assert len(set(TRAIN)) == len(set(FOUR)) == 4000
    assert len(keys(FOUR_HELD_OUT)) == 150


def test_generation_depends_on_the_seed_and_on_nothing_else():
    assert generate_problems(50, held_out=False, seed=1) == TRAIN[:50]
    assert generate_problems(50, held_out=False, seed=2) != TRAIN[:50]
    code = (
        "from megatron_fipo.tasks.countdown.problems import *;"
        "print([str(p) for n in (3, 4) for p in generate_problems(20, numbers=n, held_out=False, seed=1)])"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True
    ).stdout
    assert other.strip() == str([str(p) for p in TRAIN[:20] + FOUR[:20]])


def test_more_problems_than_there_are_is_refused():
    with pytest.raises(UserError, match=r"data.evaluation_size is 9999 but countdown has \d+ such problems"):
        generate_problems(9999, held_out=True, seed=1)


def honest_attempts(problem, trace):
    """The attempts of a trace, each as the problem and the rules demand, and only the last one may be right."""
    work, answer = trace.split("#")
    attempts = work.split(";")[:-1]
    assert len(set(attempts)) == len(attempts)
    for step in attempts:
        expression = re.sub(r"=-?\d+", "", step).rpartition("-")[0]
        tried = parsed(expression)
        assert attempt(tried, problem.target) == step + ";"
        assert tried.numbers == problem.numbers
        assert (evaluate(tried) == problem.target) == (
            step == attempts[-1] and accuracy(problem, "#" + answer) == 1.0
        )
    return attempts


@pytest.mark.parametrize(
    ("problems", "first_right", "right", "length"),
    [(TRAIN, (0.22, 0.28), (0.45, 0.6), (34, 46)), (FOUR, (0.1, 0.14), (0.45, 0.6), (90, 120))],
)
def test_traces_search_honestly_and_often_give_up(problems, first_right, right, length):
    rng = random.Random(5)
    traces = [(problem, supervised_trace(problem, rng)) for problem in problems]
    firsts = [honest_attempts(problem, trace)[0].endswith("=0") for problem, trace in traces]
    for measured, (low, high) in (
        (sum(firsts) / len(traces), first_right),
        (sum(accuracy(p, t) for p, t in traces) / len(traces), right),
        (sum(len(trace) + 1 for _, trace in traces) / len(traces), length),
    ):
        assert low < measured < high


@given(st.sampled_from(FOUR + TRAIN), st.integers(0, 2**32))
def test_a_trace_without_giving_up_is_right_and_within_the_context_of_the_model(problem, seed):
    trace = supervised_trace(problem, random.Random(seed), SEARCH)
    assert accuracy(problem, trace) == 1.0
    assert len(honest_attempts(problem, trace)) <= 17
    assert len(problem.prompt + trace) < 512


@pytest.mark.parametrize("problems", [TRAIN, FOUR])
def test_patience_buys_accuracy_with_length(problems):
    usual = STYLES[len(problems[0].numbers)]

    def measure(give_up):
        rng, style = random.Random(5), replace(usual, give_up_probabilities=(give_up, give_up))
        traces = [(p, supervised_trace(p, rng, style)) for p in problems[:1000]]
        return sum(accuracy(p, t) for p, t in traces), sum(len(t) for _, t in traces)

    (hasty_right, hasty_length), (patient_right, patient_length) = (
        measure(give_up) for give_up in sorted(usual.give_up_probabilities, reverse=True)
    )
    assert patient_right > 1.3 * hasty_right
    assert patient_length > 1.3 * hasty_length


def test_an_unsolvable_problem_has_no_trace():
    with pytest.raises(ValueError, match="1,1,1=99 has no solution"):
        supervised_trace(CountdownProblem((1, 1, 1), 99), random.Random(0))


@pytest.mark.parametrize("model_type", [None, "qwen2", "llama", "qwen3"])
def test_the_tokenizer_loads_beside_any_model_and_round_trips(tmp_path, model_type, caplog, capfd):
    save_tokenizer(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"tokenizer.json", "tokenizer_config.json"}
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 32}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert not caplog.records
    assert capfd.readouterr().err == ""
    assert len(tokenizer) == 32
    assert {tokenizer.eos_token_id, tokenizer.pad_token_id} == {0, 1}
    text = "3,7,5=26:3*7=21+5=26;#3*7+5" + CHARACTERS
    ids = tokenizer(text)["input_ids"]
    assert ids == build_tokenizer()(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
