"""`check-task`: prompts, scores and failures on 80 columns, by a scorer in a process of its own."""

import json
from pathlib import Path

import pytest

from megatron_fipo.cli.main import main
from megatron_fipo.cli.task_page import ProblemSet, Shown, given_responses
from megatron_fipo.errors import UserError
from megatron_fipo.tasks.task import Problem, TaskSettings

MODEL = Path(__file__).parents[2] / "examples/countdown/base-model"
MY_TASK = """\
from megatron_fipo.tasks import Score


def score(completion):
    right = float(completion.text == completion.problem.ground_truth)
    if completion.text == "5":
        raise ValueError("five")
    return Score(right, right, completion.text, {"size": len(completion.text)})
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    (tmp_path / "check_my_task.py").write_text(MY_TASK)
    rows = [
        {"prompt": f"{n}+1:", "reward_model": {"ground_truth": str(n + 1)}, "extra_info": {"index": f"q{n}"}}
        for n in range(3)
    ]
    for name in ("train", "held"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(
        f"model: {{path: {MODEL}}}\nrun_dir: run\ndata: {{source: jsonl, train_path: train.jsonl}}\n"
        "evaluation: {sets: {held: held.jsonl}}\nreward: {name: 'check_my_task:score'}\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_given_responses_are_scored_and_failures_have_their_traceback(folder: Path, capsys):
    lines = [
        {"problem_id": "q1", "response": "2"},
        {"problem_id": "q1", "response": "5"},
        {"row": 3, "response": "11", "set": "evaluation held", "note": "a\u2028b"},
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "responses.jsonl").write_text(text, encoding="utf-8")
    assert main(["check-task", "mine.yaml", "--responses", "responses.jsonl"]) == 2
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines() if 'File "' not in line) <= 80
    assert "training: 3 problems, prompts of 4 to 4 tokens (mean 4), reward" in out
    assert "training, row 2 of 3: problem q1," in out
    assert "evaluation held, row 3 of 3: problem q2," in out
    assert "reward 1, accuracy 1, answer '2', size 1, " in out
    assert "reward 0, accuracy 0, answer '11', size 2, " in out
    assert "FAILED        the reward function check_my_task:score raised ValueError (five)" in out
    assert 'check_my_task.py", line 7, in score' in out
    assert "ValueError: five" in out
    assert out.endswith(
        "scored 2 responses: mean reward 0.5, 1 right\nresponses that could not be scored: 1\n"
    )
    assert not (folder / "run").exists()


def test_the_first_rows_of_each_set_get_made_up_responses(folder: Path, capsys):
    assert main(["check-task", "mine.yaml", "--rows", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("ground truth") == 2
    assert out.count("response 2") == 2
    assert "scored 4 responses" in out


SETS = [
    ProblemSet(name, [Problem(f"q{n}", (1,), "p", "1", "d", task=TaskSettings()) for n in range(2)])
    for name in ("training", "evaluation a")
]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "f, line 2 is not JSON"),
        (100_000 * "[", "f, line 2 is not JSON"),
        (r'{"row": 1, "response": "\ud800"}', "f, line 2 has a response that is not valid Unicode"),
        ("[1]", "f, line 2 has no text `response`"),
        ('{"row": 1}', "f, line 2 has no text `response`"),
        ('{"response": "x"}', "f, line 2 needs one of `problem_id` and `row`"),
        ('{"response": "x", "row": 1, "problem_id": "q1"}', "needs one of"),
        ('{"response": "x", "row": 0}', "f, line 2 has the row 0; training has the rows 1 to 2"),
        ('{"response": "x", "row": true}', "has the row True"),
        ('{"response": "x", "problem_id": "q9"}', "names the problem 'q9', which no set has"),
        (
            '{"response": "x", "row": 1, "set": "b"}',
            "names the set 'b'; use one of 'training', 'evaluation a'",
        ),
    ],
)
def test_a_bad_line_is_named(line, words):
    with pytest.raises(UserError) as refused:
        given_responses(["", line], "f", SETS)
    assert words in str(refused.value)


def test_responses_to_a_problem_are_together_and_a_set_may_be_chosen():
    lines = [
        '{"response": "x", "problem_id": "q1"}',
        '{"response": "y", "row": 1, "set": "evaluation a"}',
        '{"response": "z", "row": 2}',
    ]
    assert given_responses(lines, "f", SETS) == [Shown(SETS[0], 1, ("x", "z")), Shown(SETS[1], 0, ("y",))]
    with pytest.raises(UserError, match="f has no responses; write lines such as"):
        given_responses([], "f", SETS)


def test_long_prompts_are_cut_and_keep_their_line_breaks():
    problem = Problem("q", (1,), "first\n\n" + "x" * 5000, "1", "d")
    lines = list(Shown(ProblemSet("training", [problem]), 0, ()).lines())
    assert lines[1:3] == ["  prompt        first", ""]
    assert lines[-2].strip() == "... (about 3,274 more characters)"
    assert max(map(len, lines)) <= 80
