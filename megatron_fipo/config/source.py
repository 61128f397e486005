"""The settings in a YAML file or an override, by dotted key, converted to their declared types."""

from collections.abc import Callable, Iterator
from dataclasses import Field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from megatron_fipo.config.keys import leaves, nearest_key
from megatron_fipo.config.values import convert, is_list, is_null, refuse_tag
from megatron_fipo.config.yaml_text import MAPPING, TEXT, as_written, parse, read_file
from megatron_fipo.errors import UserError
from megatron_fipo.fields import REQUIRED, quoted

Place = Callable[[yaml.Node], str]
"""Names the source of a node, for messages."""


def of_file(path: Path, schema: type) -> dict[str, Any]:
    """The settings in a YAML file. Raises UserError with file, line and key."""
    node = read_file(path)
    if node is None or is_null(node):
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise UserError(
            f"{path} must be a mapping of sections such as 'model:' and 'objective:', not a list or a single value"
        )
    return dict(_walk(node, schema, lambda node: f"{path}, line {node.start_mark.line + 1}"))


def of_override(override: str, schema: type) -> dict[str, Any]:
    """The settings of `key=value`: one, or several if the key is a section. Raises UserError with the override."""
    key, equals, text = override.partition("=")
    name = f"override {quoted(override)}"
    if not equals or not key or not all(part.isidentifier() for part in key.split(".")):
        raise UserError(f"{name} must look like section.key=value, for example optimizer.lr=1e-5")
    node = _value(key, text, schema, name)
    for part in reversed(key.split(".")):
        node = yaml.MappingNode(MAPPING, [(yaml.ScalarNode(TEXT, part), node)])
    return dict(_walk(node, schema, lambda _: name))


def _value(key: str, text: str, schema: type, name: str) -> yaml.Node:
    """The text of an override as a node. Lists and sections are YAML; everything else is taken as written."""
    kinds = dict(leaves(schema))
    section = any(known.startswith(f"{key}.") for known in kinds)
    if not section and not (key in kinds and is_list(kinds[key])):
        return as_written(text)
    try:
        return parse(text) or as_written("")
    except ValueError:
        raise UserError(f"{name}: the value is not valid YAML; write a list as in [0.8,1.2]") from None


def _walk(
    node: yaml.MappingNode, schema: Any, place: Place, root: Any = None, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting in the mapping `node` of a section."""
    root = root or schema
    items = {item.name: item for item in fields(schema)}
    seen = set()
    try:
        refuse_tag(node)
    except ValueError as error:
        raise UserError(f"{place(node)}: '{prefix.rstrip('.') or 'the file'}' {error}") from None
    for key_node, value in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(
                f"{place(key_node)}: a key must be the name of a setting, not a list or a section"
            )
        name, key = key_node.value, f"{prefix}{key_node.value}"
        if name not in items:
            raise UserError(f"{place(key_node)}: {_unknown(name, prefix, root, list(items))}")
        if name in seen:
            raise UserError(f"{place(key_node)}: '{key}' is given twice; remove one")
        seen.add(name)
        section = items[name].type
        if not is_dataclass(section):
            yield key, _value_of(items[name], key, value, place)
            continue
        if not isinstance(value, yaml.MappingNode):
            first = f"{key}.{fields(section)[0].name}"
            raise UserError(f"{place(key_node)}: '{key}' is a section and must have keys such as {first}")
        yield from _walk(value, section, place, root, f"{key}.")


def _value_of(item: Field, key: str, node: yaml.Node, place: Place) -> Any:
    if item.default == REQUIRED and isinstance(node, yaml.ScalarNode) and node.value == REQUIRED:
        return REQUIRED
    try:
        return convert(node, item.type)
    except ValueError as error:
        raise UserError(f"{place(node)}: {key} {error}") from None


def _unknown(name: str, prefix: str, root: Any, siblings: list[str]) -> str:
    """What is wrong with a key that the section `prefix` does not have."""
    key = prefix + name
    if "." in name:
        known = [setting for setting, _ in leaves(root) if "." in setting]
        meant = [setting for setting in (name, key) if setting in known] or get_close_matches(key, known, n=1)
        section, _, setting = (meant or known)[0].rpartition(".")
        return f"{quoted(name)} is not one key; write '{setting}' in the section '{section}:'"
    nearest = nearest_key(key, root, () if prefix else siblings)
    keys = ", ".join(prefix + sibling for sibling in siblings)
    hint = f"did you mean '{nearest}'?" if nearest else f"keys here are: {keys}"
    return f"unknown key {quoted(key)}; {hint}"
