"""Environments by import path."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from megatron_fipo.hooks import HookError, check_call, load_hook
from megatron_fipo.tasks.environment import Environment, Step

KEY = "environment.name"
FORM = "def step(episode: Episode)"
METHODS = {"reset": "def reset(self, problem: Problem)", "step": "def step(self, episode: Episode)"}
"""Of a class, each with its expected first line."""


class Stateless:
    """A function as an environment."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def reset(self, problem: Any) -> None: ...


MakeEnvironment = Callable[[], Environment]


def load_environment(path: str, folder: str) -> MakeEnvironment:
    """What makes one instance per response of the environment at an import path; `folder` is also searched for its module.

    Raises `HookError` for one that cannot be loaded, or is neither a function of one argument nor a class with `reset` and
    `step` that is made without arguments.
    """
    hook = f"{KEY}={path}"
    found = load_hook(path, KEY, folder)
    if not callable(found):
        raise HookError(f"{hook} is a {type(found).__name__}; name a function or a class")
    if not inspect.isclass(found):
        check_call(found, hook, FORM)
        return lambda: Stateless(found)
    for name, form in METHODS.items():
        method = getattr(found, name, None)
        if not callable(method):
            raise HookError(f"{hook}: the class has no method {name}; add it")
        check_call(partial(method, None), f"{hook}.{name}", form)
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise HookError(f"{hook}: the class must take no argument ({error})") from None
    except ValueError:  # a class of C without a signature
        pass
    return cast(MakeEnvironment, found)
