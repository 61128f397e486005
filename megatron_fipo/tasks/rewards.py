"""Rewards by the names that `reward.name` uses, by import path, and sums of them.

A new built-in reward is a function from settings to a `Reward`, a line here, and its name in `config.task_schema.REWARDS`.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron_fipo.config import RewardConfig
from megatron_fipo.field_rules import is_import_path, sum_terms
from megatron_fipo.hooks import HookError, check_call, load_hook
from megatron_fipo.tasks.choice import CHOICE
from megatron_fipo.tasks.code.reward import code_reward
from megatron_fipo.tasks.countdown.scorer import COUNTDOWN_REWARD
from megatron_fipo.tasks.dapo_math import DAPO_MATH
from megatron_fipo.tasks.exact import EXACT
from megatron_fipo.tasks.http.reward import http_reward
from megatron_fipo.tasks.math_verify import math_verify_reward
from megatron_fipo.tasks.named_numbers import RESERVED
from megatron_fipo.tasks.task import Reward

REWARDS: dict[str, Callable[[RewardConfig], Reward]] = {
    "countdown": lambda _: COUNTDOWN_REWARD,
    "dapo_math": lambda _: DAPO_MATH,
    "math_verify": lambda _: math_verify_reward(),
    "exact": lambda _: EXACT,
    "choice": lambda _: CHOICE,
    "code": code_reward,
    "http": http_reward,
}
MACHINE_DEPENDENT = ("math_verify", "code", "http")
"""Built-in rewards that may work on one node and not on another."""
FORM = "def score(completion: Completion) -> float"
"""Of a reward function; it may return a `Score` instead."""
GROUP_FORM = "def score_group(completions: list[Completion]) -> list[float]"


@dataclass(frozen=True)
class Term:
    """One reward of a sum."""

    weight: float
    name: str
    """As the configuration names it."""
    reward: Reward
    metric: str
    """Name of its own reward in the metrics: the function's name, with the module if the sum has another of that name."""


def load_terms(text: str, folder: str, settings: RewardConfig, key: str = "reward.name") -> tuple[Term, ...]:
    """The terms of a sum of rewards such as `dapo_math + 0.2*package.module:function`, which the setting `key` has.

    Built-in rewards are made with `settings`. `folder` is also searched for modules. A function by import path is a reward
    without checks of its problems; a `Reward` by import path is taken as it is. Raises `HookError` for one that cannot be
    loaded or is no reward, and `UserError` if a reward needs what this machine lacks.
    """
    terms = [
        Term(weight, name, _load(name, folder, settings, key), name.rpartition(":")[2])
        for weight, name in sum_terms(text)
    ]
    counts = Counter(term.metric for term in terms)
    named = []
    for number, term in enumerate(terms):
        if counts[term.metric] > 1 or term.metric in RESERVED:
            term = replace(term, metric=f"{re.sub('[.:]', '_', term.name)}_{number + 1}")
        named.append(term)
    return tuple(named)


def needs_trial(text: str) -> bool:
    """Whether a term of a sum can fail on a machine: one by import path, or one in `MACHINE_DEPENDENT`."""
    return any(is_import_path(name) or name in MACHINE_DEPENDENT for _, name in sum_terms(text))


def _load(name: str, folder: str, settings: RewardConfig, key: str) -> Reward:
    if not is_import_path(name):
        return REWARDS[name](settings)
    found = load_hook(name, key, folder)
    reward = found if isinstance(found, Reward) else Reward(found)
    _check(reward, f"{key}={name}")
    return reward


def _check(reward: Reward, hook: str) -> None:
    """Raise `HookError` for a reward that cannot be called."""
    if (reward.score is None) == (reward.score_group is None):
        raise HookError(
            f"{hook} is a Reward with {'neither' if reward.score is None else 'both'} of score and score_group; "
            "give it one of them"
        )
    if reward.score is not None:
        check_call(reward.score, hook, FORM)
    else:
        check_call(reward.score_group, hook, GROUP_FORM)
