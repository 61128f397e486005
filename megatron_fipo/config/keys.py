"""The dotted keys of a schema."""

import difflib
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from typing import Any, get_args, get_origin


def settings(schema: Any, prefix: str = "") -> Iterator[tuple[str, Field]]:
    """(dotted key, field) of every setting of a schema class."""
    for item in fields(schema):
        if is_dataclass(item.type):
            yield from settings(item.type, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", item


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting of an instance, or (dotted key, type) of every setting of a schema class."""
    for item in fields(config):
        key = f"{prefix}{item.name}"
        value = item.type if isinstance(config, type) else getattr(config, item.name)
        if is_dataclass(value):
            yield from leaves(value, f"{key}.")
        else:
            yield key, value


def is_mapping(kind: Any) -> bool:
    """Whether a setting of type `kind` takes names with values."""
    return get_origin(kind) is dict


def entry_type(kind: Any) -> Any:
    """What the names of a mapping have: `str`, `Any`, or the class of a section."""
    return get_args(kind)[1]


def is_section_mapping(kind: Any) -> bool:
    """Whether a setting of type `kind` takes names with sections."""
    return is_mapping(kind) and is_dataclass(entry_type(kind))


def nearest_key(key: str, root: Any, siblings: Any = ()) -> str | None:
    """The key of `root` or the sibling that an unknown key probably means: the same last name, or a similar spelling."""
    keys = [name for name, _ in leaves(root)] + list(siblings)
    leaf = key.rpartition(".")[2]
    same_leaf = [name for name in keys if name.rpartition(".")[2] == leaf]
    nearest = same_leaf[:1] or difflib.get_close_matches(key, keys, n=1, cutoff=0.7)
    if not nearest:
        by_leaf = {name.rpartition(".")[2]: name for name in keys}
        nearest = [by_leaf[name] for name in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.7)]
    return nearest[0] if nearest else None
