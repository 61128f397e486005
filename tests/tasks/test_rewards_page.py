"""The code of docs/rewards.md, executed as printed, and its table against the names of rewards."""

import re

import numpy as np

from megatron_fipo.config.task_schema import REWARDS
from megatron_fipo.scorer.result import plain_score, plain_scores
from megatron_fipo.tasks.rewards import FORM
from megatron_fipo.tasks.task import Completion, Problem, Score
from tests.pages import ROOT, run_blocks

PROBLEM = Problem("q1", (1,), "What is 5 * 7 - 1?", "34", "math")
PAGE = (ROOT / "docs/rewards.md").read_text()


def completion(text: str, tokens: int) -> Completion:
    return Completion(PROBLEM, text, np.zeros(tokens, np.int32), "stop")


def test_the_first_reward_scores_as_the_page_says():
    names = run_blocks("rewards.md", 0)
    right, wrong = completion("35 - 1\nAnswer: 34", 1000), completion("Answer: 35" + " " * 2000, 1000)
    assert plain_score(names["score"](right)) == Score(1.1, 1.0, "34", {"brief": 1.0})
    assert plain_score(names["score"](wrong)) == Score(0.0, 0.0, "35", {"brief": 0.0})
    assert plain_score(names["brevity"](right)) == Score(0.5, 1.0)


def test_the_group_reward_scores_as_the_page_says():
    reward = run_blocks("rewards.md", 1)["shortest"]
    scores = plain_scores(reward.score_group([completion("a", 10), completion("b", 5)]), 2)
    assert [score.reward for score in scores] == [0.5, 1.0]


def test_the_page_has_every_built_in_reward_and_the_form_of_an_own_one():
    table = PAGE.partition("## Built-in rewards")[2]
    assert set(REWARDS) <= set(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE))
    assert FORM in PAGE
