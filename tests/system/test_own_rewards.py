"""Training with a reward from a file outside the package: a run with two scorers, and what is refused before it starts."""

from pathlib import Path

import pytest

from megatron_fipo.cli.main import main
from megatron_fipo.config import load_config
from megatron_fipo.driver.cluster import try_rewards
from megatron_fipo.driver.scoring.rehearsal import trials
from megatron_fipo.errors import UserError
from megatron_fipo.tasks.task import Problem, TaskSettings
from tests.system.runs import ROOT, TINY, iterations

MODEL = ROOT / "examples/countdown/base-model"
MY_TASK = """\
from megatron_fipo.tasks import Completion, Score


def score(completion: Completion) -> Score:
    right = completion.problem.ground_truth.split("=")[1] in completion.text
    return Score(float(right), float(right), extra={"tidy": float("#" in completion.text)})


def brief(completion: Completion) -> float:
    return 1 / (1 + len(completion.text))
"""
BAD = """\
import itertools


def raises(completion):
    return {}["missing"]


def nan(completion):
    return float("nan")


def text(completion):
    return "1.0"


def many(completion):
    return [1.0]


def endless(completion):
    for _ in itertools.count():
        pass


def hangs(completion):
    return sum(itertools.repeat(1))


def ends(completion):
    import os

    os._exit(3)
"""


def test_a_run_by_a_reward_from_a_file_in_the_folder_of_the_command(
    cluster_of_runs, tmp_path: Path, monkeypatch, capsys
):
    (tmp_path / "my_task.py").write_text(MY_TASK)
    monkeypatch.chdir(tmp_path)
    settings = [
        *TINY,
        f"model.path={MODEL}",
        "run_dir=run",
        f"ray_address={cluster_of_runs}",
        "iterations=1",
        "reward.name=my_task:score + 0.5*my_task:brief",
        "reward.scorers=2",
        "rollout.filter_by=reward",
    ]
    assert main(["train", str(ROOT / "examples/countdown/fipo.yaml"), *settings]) == 0
    out = capsys.readouterr().out
    assert "scored a made-up response to a problem of 2 sets by your own reward" in out
    (values,) = iterations(tmp_path / "run")
    assert 0 <= values["reward/tidy"] <= 1
    assert 0 < values["reward/brief"] < 1
    assert values["reward/mean"] <= values["reward/score"] + 0.5 * values["reward/brief"] + 1e-9
    assert values["accuracy/mean"] == values["reward/score"], "of the first term"
    assert values["scorers/failures"] == values["groups/unscored"] == 0
    metrics = (tmp_path / "run/metrics.jsonl").read_text()
    assert '"evaluation/countdown/tidy"' in metrics
    assert '"evaluation/countdown/brief"' in metrics


@pytest.fixture(scope="module")
def bad_module(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("folder")
    (folder / "bad_task.py").write_text(BAD)
    return folder


@pytest.mark.parametrize(
    ("name", "words", "trace"),
    [
        (
            "raises",
            "raised KeyError ('missing') for response 1 of 1 to problem q1 of the set a; correct the",
            True,
        ),
        (
            "nan",
            "returned nan (float), not a finite number or a Score for response 1 of 1 to problem q1",
            False,
        ),
        ("text", "returned '1.0' (str), not a finite number or a Score", False),
        ("many", "returned [1.0] (list), not a finite number or a Score", False),
        ("endless", "took more than reward.timeout_s = 0.5 s", False),
        (
            "hangs",
            "a scorer did not return within 1.5 s; correct the reward function, which does not return",
            False,
        ),
        ("ends", "a scorer died", False),
    ],
)
def test_a_reward_that_fails_ends_the_run_at_the_start_with_its_row(
    cluster, bad_module: Path, monkeypatch, name, words, trace
):
    monkeypatch.chdir(bad_module)
    monkeypatch.setattr("megatron_fipo.driver.scoring.rehearsal.GRACE_S", 1.0)
    reward = f"bad_task:{name}"
    config = load_config(
        None, [f"model.path={MODEL}", "run_dir=r", "reward.timeout_s=0.5", "evaluation.sets.a=held.jsonl"]
    )
    problem = Problem("q1", (1,), "prompt", "1", "test", task=TaskSettings("a", reward))
    with pytest.raises(UserError) as refused:
        try_rewards(config, str(MODEL), trials(config, [], {"a": [problem]}, [7, 5]), lambda _: None)
    message = str(refused.value)
    assert message.startswith("held.jsonl: with the made-up response 'Answer: 42' to problem q1, ")
    assert words in message
    assert "\n" not in message
    if trace:
        assert 'bad_task.py", line 5, in raises\n    return {}["missing"]' in refused.value.trace


def test_each_own_reward_is_tried_once_on_each_set():
    config = load_config(
        None, ["model.path=m", "run_dir=r", "data.train_path=train.jsonl", "evaluation.sets.a=held.jsonl"]
    )

    def problem(name: str, reward: str, of_set: str = "") -> Problem:
        return Problem(name, (1,), "prompt", "1", "test", task=TaskSettings(of_set, reward))

    train = [
        problem("1", "dapo_math"),
        problem("2", "my:f"),
        problem("3", "my:f"),
        problem("4", "exact + my:g"),
    ]
    found = trials(config, train, {"a": [problem("5", "my:f", "a"), problem("6", "my:f", "a")]}, [7])
    assert [(trial.source, trial.request.problem.problem_id) for trial in found] == [
        ("train.jsonl", "2"),
        ("train.jsonl", "4"),
        ("held.jsonl", "5"),
    ]
