"""YAML as nodes whose scalars keep their text, so that a setting's declared type decides what the text means.

YAML itself would read `0123` as 83, `1:30` as 90, `yes` as true and `1e-6` as text. Here only null is resolved: an
unquoted `null`, `~` or nothing.
"""

import math
import re
from pathlib import Path
from typing import Any

import yaml

from megatron_fipo.errors import UserError, first_line
from megatron_fipo.fields import REQUIRED

NULL = "tag:yaml.org,2002:null"
TEXT = "tag:yaml.org,2002:str"
LIST = "tag:yaml.org,2002:seq"
MAPPING = "tag:yaml.org,2002:map"
_NULL_WORDS = re.compile(r"(?:~|null|Null|NULL|)\Z")
_PROBLEMS = (
    ("but found another document", "a second document begins here; a configuration file has one"),
    ("'\\t'", "a tab stands where YAML permits only spaces"),
)
"""What PyYAML's description contains, and the description to print."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that has a meaning without quotes, and text with line breaks or control characters.

    PyYAML writes some line breaks within single quotes so that it reads others.
    """


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(
        TEXT, text, style='"' if has_meaning(text) or not text.isprintable() else None
    )


_Dumper.add_representer(str, _represent_text)


class _Loader(yaml.BaseLoader):
    """Resolves nothing but null."""


_Loader.add_implicit_resolver(NULL, _NULL_WORDS, ["~", "n", "N", ""])


def read_file(path: Path) -> yaml.Node | None:
    """The content of a YAML file, None if it is empty. Raises UserError if it cannot be read or is not YAML."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"no configuration file {path}; ready-made ones are in examples/") from None
    except OSError as error:
        raise UserError(f"cannot read the configuration file {path}: {error.strerror or error}") from None
    try:
        return parse(content)
    except ValueError as error:
        raise UserError(f"{path}{error}") from None


def parse(content: str | bytes) -> yaml.Node | None:
    """The node of a YAML document, None for an empty one.

    Raises ValueError if it is not YAML. The message begins with the line.
    """
    try:
        return yaml.compose(content, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        problem = error.problem or first_line(error)
        problem = next((better for part, better in _PROBLEMS if part in problem), problem)
        raise ValueError(f"{line} is not valid YAML: {problem}") from None
    except yaml.YAMLError as error:  # bytes that are not UTF-8 (or UTF-16), control characters
        raise ValueError(f" is not a text file: {first_line(error)}") from None
    except RecursionError:
        raise ValueError(" is not a configuration: it is nested too deeply") from None


def dump(values: dict[str, Any]) -> str:
    """Nested settings as YAML, one line each, in their order; `parse` gives every text back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)


def has_meaning(text: str) -> bool:
    """Whether unquoted text is refused: it marks a missing value, or looks like a reference to another value."""
    return text == REQUIRED or "${" in text


def as_written(text: str) -> yaml.ScalarNode:
    """`text` as an unquoted scalar, without YAML's rules for comments, quotes and blanks."""
    return yaml.ScalarNode(NULL if _NULL_WORDS.match(text) else TEXT, text)
