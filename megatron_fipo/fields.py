"""Settings as dataclass fields that carry their own range or choices, and the check of both.

    half_life: float = number(32.0, above=0, finite=False)
    name: str = choice("fipo", "dapo", "grpo")

Loading, validation, `megatron-fipo config` and the loss read the same metadata. Standard library only.
"""

import difflib
import math
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

_KEY = "setting"


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
        return f"must be {self}, not {value!r}" + (f" (did you mean '{nearest[0]}'?)" if nearest else "")

    def __str__(self) -> str:
        return "one of " + ", ".join(self.names)


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


def rule_of(item: Any) -> Range | Choices | None:
    """The range or choices of a dataclass field, None if it has neither."""
    return item.metadata.get(_KEY)


def first_violation(settings: Any, prefix: str = "") -> str | None:
    """The first setting outside its range or choices as a sentence with its dotted key; None if there is none.

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
    """Raise ValueError, naming setting and value, for the first one outside its range or choices."""
    if (violation := first_violation(settings)) is not None:
        raise ValueError(violation)
