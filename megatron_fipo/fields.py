"""Settings as dataclass fields that carry the rule for their values (range, choices, path), and the check of it.

    half_life: float = number(32.0, above=0, finite=False)
    name: str = choice("fipo", "dapo", "grpo")
    run_dir: str = file_path(REQUIRED)

Loading, validation, `megatron-fipo config` and the loss read the same metadata. Standard library only.
"""

import difflib
import math
import os
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

REQUIRED = "???"
"""The default of a setting that has none: a value must be given."""
_KEY = "setting"


def quoted(value: Any) -> str:
    """A value as Python writes it, on one line, shortened if it is long text."""
    return repr(f"{value[:77]}..." if isinstance(value, str) and len(value) > 80 else value)


@dataclass(frozen=True)
class Range:
    """The values that a number may take. Bounds that are None do not exist."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    finite: bool = True

    def __contains__(self, value: Any) -> bool:
        return (
            isinstance(value, (int, float))
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (math.isfinite(value) if self.finite else not math.isnan(value))
        )

    def refusal(self, value: Any) -> str:
        """What is wrong with a value outside the range."""
        infinite = isinstance(value, float) and math.isinf(value)
        rule = "finite" if self.finite and infinite else str(self)
        return f"must be {rule}, not {value}"

    def __str__(self) -> str:
        names = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        bounds = [f"{name} {bound:g}" for name, bound in names.items() if bound is not None]
        return " and ".join(bounds) or "finite"


@dataclass(frozen=True)
class Choices:
    """The strings that a setting may take."""

    names: tuple[str, ...]

    def __contains__(self, value: Any) -> bool:
        return value in self.names

    def refusal(self, value: Any) -> str:
        """What is wrong with another value, with the nearest choice."""
        nearest = difflib.get_close_matches(str(value), self.names, n=1)
        return f"must be {self}, not {quoted(value)}" + (
            f" (did you mean '{nearest[0]}'?)" if nearest else ""
        )

    def __str__(self) -> str:
        return "one of " + ", ".join(self.names)


@dataclass(frozen=True)
class FilePath:
    """Text that names a file or folder. Loading replaces a leading `~` by the home folder."""

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, str) and bool(value.strip()) and "\0" not in value

    def refusal(self, value: Any) -> str:
        """What is wrong with a value that names no file."""
        return f"must be the path of a file or folder, not {quoted(value)}"

    def __str__(self) -> str:
        return "a path; a leading ~ is the home folder"


Rule = Range | Choices | FilePath


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


def choice(default: str, *others: str) -> Any:
    """A field that holds one of the given strings, the first by default."""
    return field(default=default, metadata={_KEY: Choices((default, *others))})


def file_path(default: str | None) -> Any:
    """A field that holds the path of a file or folder."""
    return field(default=default, metadata={_KEY: FilePath()})


def rule_of(item: Any) -> Rule | None:
    """The rule for the values of a dataclass field, None if it has none."""
    return item.metadata.get(_KEY)


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
        if is_dataclass(value):
            if (found := first_violation(value, f"{key}.")) is not None:
                return found
        elif rule is not None and value not in rule and not (value is None and item.default is None):
            return f"{key} {rule.refusal(value)}"
    return None


def check(settings: Any) -> None:
    """Raise ValueError, naming setting and value, for the first one that breaks its rule."""
    if (violation := first_violation(settings)) is not None:
        raise ValueError(violation)
