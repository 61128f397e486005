"""Rewards by import path: what is refused when it is loaded, in one sentence with the setting, and names of terms."""

import itertools
import sys
from pathlib import Path

import pytest

from megatron_fipo.config import RewardConfig
from megatron_fipo.config.task_schema import REWARDS as NAMES
from megatron_fipo.hooks import HookError
from megatron_fipo.tasks.rewards import FORM, REWARDS, load_terms
from megatron_fipo.tasks.task import Reward

_modules = itertools.count()


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Loads a sum; `MODULE` in it stands for a module with this code."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def load(code: str, text: str = "MODULE:score"):
        module = f"reward_module_{next(_modules)}"
        (tmp_path / f"{module}.py").write_text(code)
        return load_terms(text.replace("MODULE", module), str(tmp_path), RewardConfig(), "data.sets.a.reward")

    return load


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def score(text, problem): ...", "has the arguments (text, problem), but it is called with one"),
        ("def score(*, completion): ...", "has the arguments (*, completion), but it is called with one"),
        ("def score(): ...", "has the arguments (), but it is called with one"),
        ("async def score(c): ...", "is an async function, whose call returns before it has run"),
        ("def score(c):\n    yield 1.0", "is a generator (it has a `yield`)"),
        ("async def score(c):\n    yield 1.0", "is a generator"),
        ("class score:\n    def __init__(self, c): ...", "is a class, which only makes an object"),
        ("class A:\n    async def __call__(self, c): ...\nscore = A()", "is an async function"),
        ("score = 3", "is a int, which cannot be called"),
        ("from functools import partial\nscore = partial(print, sep='')", None),
        ("class A:\n    def __call__(self, c, strict=False): ...\nscore = A()", None),
        ("score = lambda c: 1.0", None),
    ],
)
def test_only_a_function_of_one_argument_is_a_reward(load, code, words):
    if words is None:
        (term,) = load(code)
        assert isinstance(term.reward, Reward)
        return
    with pytest.raises(HookError) as refused:
        load(code)
    message = str(refused.value)
    assert message.startswith("data.sets.a.reward=reward_module_")
    assert words in message
    assert message.endswith(f"the form is `{FORM}`")


@pytest.mark.parametrize(
    ("code", "words", "trace"),
    [
        ("import nothing_like_this", "No module named 'nothing_like_this'; install it", "line 1"),
        (
            "x = 1\nx.y",
            "its module raises AttributeError ('int' object has no attribute 'y') when it is",
            "line 2",
        ),
        ("raise SystemExit(3)", "its module raises SystemExit (3)", "SystemExit: 3"),
        ("def score(c) return 1", "its module raises SyntaxError", "SyntaxError"),
        ("def other(c): ...", "has no score; check the name", None),
        ("def __getattr__(name): raise ValueError('odd')", "its module raises ValueError (odd)", "line 1"),
        (
            "from megatron_fipo.tasks import Reward\nscore = Reward(None)",
            "with neither of score and score_group",
            None,
        ),
        (
            "from megatron_fipo.tasks import Reward\nscore = Reward(print, score_group=print)",
            "with both",
            None,
        ),
        (
            "from megatron_fipo.tasks import Reward\nscore = Reward(None, score_group=lambda: [])",
            "the form is `def score_group(completions: list[Completion]) -> list[float]`",
            None,
        ),
    ],
)
def test_a_module_that_cannot_be_used_is_shown_with_its_own_traceback(load, code, words, trace):
    with pytest.raises(HookError) as refused:
        load(code)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert (trace or "") in refused.value.trace
    assert bool(refused.value.trace) == (trace is not None)
    assert "importlib" not in refused.value.trace
    assert "megatron_fipo/hooks.py" not in refused.value.trace


def test_a_module_of_python_in_the_place_of_the_user_s_is_named(load):
    with pytest.raises(
        HookError, match="the module sys, which is a part of Python, has no score; check the name"
    ):
        load("", "sys:score")


def test_terms_have_their_own_names_in_the_metrics(load):
    code = "def score(c): ...\ndef mean(c): ...\ndef tidy(c): ..."
    terms = load(code, "exact + MODULE:tidy + 0.5*MODULE:mean")
    module = terms[1].name.partition(":")[0]
    assert [term.metric for term in terms] == ["exact", "tidy", f"{module}_mean_3"]
    assert [term.weight for term in terms] == [1.0, 1.0, 0.5]
    both = load(code, "MODULE:score + tests.scorer.own_rewards:score")
    assert [term.metric for term in both] == [
        f"{both[0].name.partition(':')[0]}_score_1",
        "tests_scorer_own_rewards_score_2",
    ]


def test_every_built_in_reward_can_be_made():
    made = [make(RewardConfig()) for name, make in REWARDS.items() if name != "math_verify"]
    assert all((reward.score is None) != (reward.score_group is None) for reward in made)
    assert set(REWARDS) == set(NAMES)
