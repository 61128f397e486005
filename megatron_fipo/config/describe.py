"""The schema as a commented YAML file: every setting with its meaning and default, taken from the schema's source."""

import inspect
import textwrap
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

import yaml

from megatron_fipo.fields import field_docs, rule_of


def describe(schema: type, indent: int = 0) -> str:
    """YAML of the defaults with the docstrings as comments; `load_config` reads it back once the `???` are filled in."""
    blocks = []
    docs = field_docs(schema)
    for item in fields(schema):
        if is_dataclass(item.type):
            comment = inspect.cleandoc(item.type.__doc__ or "")
            blocks.append(f"{_comment(comment)}\n{item.name}:\n{describe(item.type, 2)}")  # type: ignore[arg-type]
            continue
        comment = docs[item.name]
        if (rule := rule_of(item)) is not None:
            comment += f"\nMust be {rule}."
        blocks.append(f"{_comment(comment)}\n{item.name}: {_yaml(_default(item))}")
    return textwrap.indent("\n".join(blocks), " " * indent)


def _default(item: Any) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _yaml(value: Any) -> str:
    if isinstance(value, float):
        return str(value) if "e" not in str(value) else f"{value:.1e}"
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def _comment(text: str) -> str:
    return "\n".join(f"# {line}" for line in text.splitlines())
