"""The word problems of examples/smollm-math: exact answers, no numbers of a template in two files, DAPO's rows and prompt."""

import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples/smollm-math"
sys.path.append(str(EXAMPLE))
import make_data  # noqa: E402
import templates  # noqa: E402

from megatron_fipo.tasks.dapo_math import dapo_math_doubt, dapo_math_obstacle, score_dapo_math  # noqa: E402
from megatron_fipo.tasks.published.forms import form_of  # noqa: E402
from megatron_fipo.tasks.supervised_rows import parse_example  # noqa: E402
from megatron_fipo.tasks.task import Completion, Problem  # noqa: E402

DAPO_PROMPT = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer "
    "(without quotes) where $Answer is the answer to the problem.\n\n{}\n\nRemember to put your answer on its own line after "
    '"Answer:".'
)
"""As published in BytedTsinghua-SIA/DAPO-Math-17k."""


@pytest.fixture(scope="module")
def files():
    return make_data.generate(seed=1)


def test_every_step_and_answer_is_exact(files):
    for problem in (problem for problems in files.values() for problem in problems):
        steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", problem.solution)
        assert 1 <= len(steps) <= 3
        for left, operator, right, result in steps:
            exact = {
                "+": int(left) + int(right),
                "-": int(left) - int(right),
                "*": int(left) * int(right),
                "/": int(left) / int(right),
            }[operator]
            assert exact == int(result) >= 1
        assert problem.answer == int(steps[-1][3])
        assert not re.search(r"[{}<>]|None", problem.question + problem.solution)


def test_results_of_a_step_are_used_and_numbers_come_from_the_question(files):
    for problem in (problem for problems in files.values() for problem in problems):
        known = {*re.findall(r"\d+", problem.question), "2"}  # "each": 2 * a
        for left, _, right, result in re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", problem.solution):
            assert {left, right} <= known
            known.add(result)


def test_no_template_has_the_same_numbers_in_two_files(files):
    places = defaultdict(set)
    patterns = [
        (template, re.compile(re.sub(r"\\\{[a-z]+\\\}", "(.+?)", re.escape(template.question))))
        for template in (*templates.ONE_STEP, *templates.TWO_STEPS)
    ]
    for name, problems in files.items():
        assert len(problems) == make_data.FILES[name]
        for problem in problems:
            found = [
                index for index, (_, pattern) in enumerate(patterns) if pattern.fullmatch(problem.question)
            ]
            places[found[0], tuple(re.findall(r"\d+", problem.question))].add(name)
    assert all(len(names) == 1 for names in places.values())
    assert len({index for index, _ in places}) == len(patterns)


def test_the_file_of_a_problem_is_the_same_on_every_machine(files):
    assert [file[0].question for file in files.values()] == EXPECTED
    assert make_data.generate(seed=1) == files != make_data.generate(seed=2)


EXPECTED = [
    "25 plums are packed into 5 equal packages. How many plums are in each package?",
    "Chloe earns 8 dollars an hour and works 3 hours. Then Chloe spends 5 dollars. How many dollars are left?",
    "Ben is 17 years old. Fatima is 11 years older. How old is Fatima?",
]


def test_rows_are_those_of_dapo_with_a_response_that_its_scorer_accepts(files):
    for problem in (problem for problems in files.values() for problem in problems):
        row = json.loads(json.dumps(problem.row))
        read = form_of("f", list(row)).read("f", row)
        assert read.prompt == DAPO_PROMPT.format(problem.question)
        assert read.answer == str(problem.answer)
        assert dapo_math_obstacle(read.answer) is None is dapo_math_doubt(read.answer)
        prompt, response = parse_example("f", row)
        assert prompt == (("user", read.prompt),)
        target = Problem("0", (1,), read.prompt, read.answer, "")
        no_tokens = np.zeros(0, dtype=np.int32)
        assert score_dapo_math(Completion(target, response, no_tokens, "stop")).accuracy == 1
        wrong = response[: response.rindex(":")] + f": {problem.answer + 1}"
        assert score_dapo_math(Completion(target, wrong, no_tokens, "stop")).accuracy == 0


def test_the_command_writes_the_files(files, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make_data.py", str(tmp_path / "data")])
    assert make_data.main() == 0
    for name, problems in files.items():
        lines = (tmp_path / "data" / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [json.loads(json.dumps(p.row)) for p in problems]
