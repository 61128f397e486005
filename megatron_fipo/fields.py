"""Settings as dataclass fields that carry the rule for their values (range, choices, path), and the check of it.

    half_life: float = number(32.0, above=0, finite=False)
    name: str = choice("fipo", "dapo", "grpo")
    run_dir: str = file_path(REQUIRED)
    engine: str = hook("local", "vllm")

Loading, validation, `megatron-fipo config` and the loss read the same metadata. Standard library only.
"""

import ast
import inspect
import os
import textwrap
from dataclasses import field, fields, is_dataclass
from itertools import pairwise
from typing import Any

from megatron_fipo.field_rules import (
    Choices,
    FilePath,
    FreeValues,
    Hook,
    HookSum,
    NamedHooks,
    NamedTexts,
    Range,
    Rule,
    Sections,
    Variables,
    name_fault,
)

REQUIRED = "???"
"""The default of a setting that has none: a value must be given."""
_KEY = "setting"


def number(
    default: float | None,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    finite: bool = True,
) -> Any:
    """A field that holds a number within a range: bounds inclusive (least, most) or exclusive (above, below)."""
    return field(default=default, metadata={_KEY: Range(least, most, above, below, finite)})


def choice(default: str | None, *others: str) -> Any:
    """A field that holds one of the given strings, the first by default. None: none of them by default."""
    names = (*(() if default is None else (default,)), *others)
    return field(default=default, metadata={_KEY: Choices(names)})


def file_path(default: str | None) -> Any:
    """A field that holds the path of a file or folder."""
    return field(default=default, metadata={_KEY: FilePath()})


def hook(default: str | None, *others: str) -> Any:
    """A field that holds the name of a built-in part, the first by default, or an import path. None: nothing by default."""
    return field(default=default, metadata={_KEY: Hook((*(() if default is None else (default,)), *others))})


def hook_sum(default: str | None, *others: str) -> Any:
    """A field that holds a hook or a weighted sum of hooks."""
    names = (*(() if default is None else (default,)), *others)
    return field(default=default, metadata={_KEY: HookSum(Hook(names))})


def named_hook_sums(*names: str) -> Any:
    """A field that holds sums of hooks by name, empty by default."""
    return field(default_factory=dict, metadata={_KEY: NamedHooks(HookSum(Hook(names)))})


def named_texts(*names: str) -> Any:
    """A field that holds texts by some of the given names, empty by default."""
    return field(default_factory=dict, metadata={_KEY: NamedTexts(names)})


def sections() -> Any:
    """A field that holds sections of one class by name, empty by default."""
    return field(default_factory=dict, metadata={_KEY: Sections()})


def free_values() -> Any:
    """A field that holds any values by name, empty by default."""
    return field(default_factory=dict, metadata={_KEY: FreeValues()})


def variables() -> Any:
    """A field that holds values of environment variables by name, empty by default."""
    return field(default_factory=dict, metadata={_KEY: Variables()})


def rule_of(item: Any) -> Rule | None:
    """The rule for the values of a dataclass field, None if it has none."""
    return item.metadata.get(_KEY)


def field_docs(schema: type) -> dict[str, str]:
    """The docstring of each field of a dataclass; fields without one are absent."""
    body = ast.parse(textwrap.dedent(inspect.getsource(schema))).body[0].body  # type: ignore[attr-defined]
    docs = {}
    for statement, following in pairwise(body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            docs[statement.target.id] = inspect.cleandoc(str(following.value.value))  # type: ignore[union-attr]
    return docs


def expand_home(path: str) -> str:
    """Replace a leading `~` or `~user` by that home folder. Raises ValueError if there is none."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = path.partition("/")[0]
        raise ValueError(f"there is no home folder {user}; write ./{path} for a folder of that name")
    return expanded


def first_violation(settings: Any, prefix: str = "") -> str | None:
    """The first setting that breaks its rule as a sentence with its dotted key; None if there is none.

    Sections are followed. None is accepted only if it is the default.
    """
    for item in fields(settings):
        key, value, rule = f"{prefix}{item.name}", getattr(settings, item.name), rule_of(item)
        parts = {key: value}
        if isinstance(rule, Sections) and isinstance(value, dict):
            parts = {f"{key}.{name}": part for name, part in value.items() if name_fault(name) is None}
        for part, section in parts.items():
            if is_dataclass(section) and (found := first_violation(section, f"{part}.")) is not None:
                return found
        if is_dataclass(value):
            continue
        if rule is not None and value not in rule and not (value is None and item.default is None):
            return f"{key} {rule.refusal(value)}"
    return None


def check(settings: Any) -> None:
    """Raise ValueError, naming setting and value, for the first one that breaks its rule."""
    if (violation := first_violation(settings)) is not None:
        raise ValueError(violation)
