"""The rules that values of settings follow (range, choices, path, hook, ...): each says what is wrong with a value.

Standard library only.
"""

import difflib
import math
import re
from dataclasses import dataclass, is_dataclass
from typing import Any

from megatron_fipo.secrecy import has_password, is_secret

LONGEST_NAME, LONGEST_PATH = 255, 4000
"""Bytes that Linux accepts; of a path some less, for the files in a folder."""


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
        return (
            isinstance(value, str) and bool(value.strip()) and "\0" not in value and not self._is_long(value)
        )

    @staticmethod
    def _is_long(path: str) -> bool:
        sizes = [len(part.encode("utf-8", "surrogatepass")) for part in (path, *path.split("/"))]
        return sizes[0] > LONGEST_PATH or max(sizes[1:]) > LONGEST_NAME

    def refusal(self, value: Any) -> str:
        """What is wrong with a value that names no file."""
        if isinstance(value, str) and self._is_long(value):
            return f"must have names of at most {LONGEST_NAME} bytes, and {LONGEST_PATH:,} in all, not {quoted(value)}"
        return f"must be the path of a file or folder, not {quoted(value)}"

    def __str__(self) -> str:
        return "a path; a leading ~ is the home folder"


_IDENTIFIER = r"[A-Za-z_][A-Za-z0-9_]*"
_IMPORT_PATH = re.compile(rf"{_IDENTIFIER}(?:\.{_IDENTIFIER})*:{_IDENTIFIER}")
_TERM = re.compile(r"(?:(?P<weight>[0-9.eE+-]+)\s*\*)?\s*(?P<name>[^\s*]+)")


def is_import_path(name: str) -> bool:
    """Whether a name is `package.module:object`."""
    return _IMPORT_PATH.fullmatch(name) is not None


@dataclass(frozen=True)
class Hook:
    """One of the names of built-in parts, or the import path of a part that the user brings."""

    names: tuple[str, ...]

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, str) and (value in self.names or is_import_path(value))

    def refusal(self, value: Any) -> str:
        """What is wrong with another value, with the nearest name."""
        nearest = difflib.get_close_matches(str(value), self.names, n=1)
        return f"must be {self}, not {quoted(value)}" + (
            f" (did you mean '{nearest[0]}'?)" if nearest else ""
        )

    def __str__(self) -> str:
        return f"{', '.join(self.names)}{' or ' if self.names else ''}an import path package.module:name"


@dataclass(frozen=True)
class HookSum:
    """A hook, or a sum of hooks with weights: `dapo_math + 0.2*package.module:function`."""

    hook: Hook

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, str) and self._fault(value) is None

    def refusal(self, value: Any) -> str:
        """What is wrong with the first term that breaks the rule."""
        return self._fault(value) if isinstance(value, str) else f"must be {self}, not {quoted(value)}"  # type: ignore[return-value]

    def _fault(self, text: str) -> str | None:
        try:
            terms = sum_terms(text)
        except ValueError as error:
            return str(error)
        for _, name in terms:
            if name not in self.hook:
                return self.hook.refusal(name)
        names = [name for _, name in terms]
        repeated = next((name for name in names if names.count(name) > 1), None)
        return None if repeated is None else f"must not have {quoted(repeated)} twice; add its weights"

    def __str__(self) -> str:
        return f"{self.hook}, or a sum of these as in A + 0.5*B"


def sum_terms(text: str) -> tuple[tuple[float, str], ...]:
    """The terms (weight, name) of a sum such as `A + 0.5*B`; a weight that is not given is 1.

    Raises ValueError, as the end of a sentence that begins with the key, for a term that is none.
    """
    terms = []
    for part in re.split(r"(?<![eE*])\+", text):
        match = _TERM.fullmatch(part.strip())
        try:
            weight = float(match["weight"] or 1) if match else math.nan
        except ValueError:
            weight = math.nan
        if match is None or not math.isfinite(weight) or weight == 0:
            raise ValueError(f"must be a name or a sum of names as in A + 0.5*B, not {quoted(text)}")
        terms.append((weight, match["name"]))
    return tuple(terms)


def name_fault(name: Any) -> str | None:
    """What is wrong with the name of a set; it becomes a part of metric names and of keys in overrides."""
    if isinstance(name, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,39}", name):
        return None
    return f"must not have the name {quoted(name)}; use at most 40 letters, digits and _, a letter first"


@dataclass(frozen=True)
class Sections:
    """A mapping of names to sections of one class. The first field of the section is what an entry of text alone gives."""

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, dict) and all(
            name_fault(name) is None and is_dataclass(section) for name, section in value.items()
        )

    def refusal(self, value: Any) -> str:
        """What is wrong with the first name that breaks the rule; sections are checked by themselves."""
        if not isinstance(value, dict):
            return f"must be names with sections, not {quoted(value)}"
        return next(fault for name in value if (fault := name_fault(name)) is not None)

    def __str__(self) -> str:
        return "names (letters, digits, _), each with a section"


@dataclass(frozen=True)
class NamedHooks:
    """A mapping of any text to sums of hooks."""

    hooks: HookSum

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, dict) and all(
            isinstance(name, str) and text in self.hooks for name, text in value.items()
        )

    def refusal(self, value: Any) -> str:
        """What is wrong with the first entry that breaks the rule."""
        if not isinstance(value, dict):
            return f"must be names with hooks, not {quoted(value)}"
        name, text = next(entry for entry in value.items() if entry[1] not in self.hooks)
        return f"of {quoted(name)} {self.hooks.refusal(text)}"

    def __str__(self) -> str:
        return f"names, each with {self.hooks}"


@dataclass(frozen=True)
class NamedTexts:
    """A mapping of some of the given names to texts that are not blank."""

    names: tuple[str, ...]

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, dict) and all(
            name in self.names and isinstance(text, str) and text.strip() for name, text in value.items()
        )

    def refusal(self, value: Any) -> str:
        """What is wrong with the first entry that breaks the rule."""
        if not isinstance(value, dict):
            return f"must be names with texts, not {quoted(value)}"
        for name, text in value.items():
            if name not in self.names:
                nearest = difflib.get_close_matches(str(name), self.names, n=1)
                meant = f" (did you mean {quoted(nearest[0])}?)" if nearest else ""
                return f"must not have the name {quoted(name)}{meant}; the names are {', '.join(self.names)}"
            if not (isinstance(text, str) and text.strip()):
                return f"needs a text for {name}, not {quoted(text)}"
        raise AssertionError("every entry follows the rule")

    def __str__(self) -> str:
        return f"texts by the names {', '.join(self.names)}"


@dataclass(frozen=True)
class FreeValues:
    """A mapping of names to any YAML values, which another library checks."""

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, dict) and all(
            isinstance(name, str) and name.isidentifier() for name in value
        )

    def refusal(self, value: Any) -> str:
        """What is wrong with the first name that breaks the rule."""
        if not isinstance(value, dict):
            return f"must be names with values, not {quoted(value)}"
        name = next(name for name in value if not (isinstance(name, str) and name.isidentifier()))
        return f"must not have the name {quoted(name)}; use letters, digits and _"

    def __str__(self) -> str:
        return "names with any values"


@dataclass(frozen=True)
class Variables:
    """A mapping of environment variables to values that are not secret, because they are stored and printed."""

    _NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, dict) and all(
            self._fault(name, text) is None for name, text in value.items()
        )

    def refusal(self, value: Any) -> str:
        """What is wrong with the first entry that breaks the rule, without its value."""
        if not isinstance(value, dict):
            return f"must be names of variables with values, not {quoted(value)}"
        return next(fault for name, text in value.items() if (fault := self._fault(name, text)) is not None)

    def _fault(self, name: Any, text: Any) -> str | None:
        if not isinstance(name, str) or not self._NAME.fullmatch(name):
            return f"must not have the name {quoted(name)}; use that of an environment variable"
        if not isinstance(text, str) or "\0" in text:
            return f"needs a text for {name}"
        if is_secret(name) or has_password(text):
            return (
                f"must not have {name}, which looks like a secret: settings are stored with the run and printed; set it in "
                "the environment in which Ray starts on each node"
            )
        return None

    def __str__(self) -> str:
        return "names of environment variables with values, none of them secret"


Rule = (
    Range | Choices | FilePath | Hook | HookSum | Sections | NamedHooks | NamedTexts | FreeValues | Variables
)
