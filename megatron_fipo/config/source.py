"""The settings in a YAML file or an override, by dotted key, converted to their declared types."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from megatron_fipo.config.keys import entry_type, is_mapping, is_section_mapping, leaves, nearest_key
from megatron_fipo.config.values import convert, free_value, is_list, is_null, refuse_tag
from megatron_fipo.config.yaml_text import MAPPING, TEXT, as_written, parse, read_file
from megatron_fipo.errors import UserError
from megatron_fipo.field_rules import name_fault, quoted
from megatron_fipo.fields import REQUIRED

Place = Callable[[yaml.Node], str]
"""Names the source of a node, for messages."""


REPLACED = {
    "data.evaluation_path": "evaluation.sets: give each file a name, evaluation.sets.NAME=FILE",
}
"""Settings of earlier versions, and what they are called now."""


def of_file(path: Path, schema: type, *, stored: bool = False) -> dict[str, Any]:
    """The settings in a YAML file. Raises UserError with file, line and key.

    A `stored` file was written by `save_config`, perhaps of an earlier version: what is `REPLACED` is left out.
    """
    node = read_file(path)
    if node is None or is_null(node):
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise UserError(
            f"{path} must be a mapping of sections such as 'model:' and 'objective:', not a list or a single value"
        )
    if stored:
        _leave_out(node, REPLACED)
    values = dict(_walk(node, schema, lambda node: f"{path}, line {node.start_mark.line + 1}"))
    for key, kind in leaves(schema):
        entries = [name for name, value in values.items() if value is None and name.startswith(f"{key}.")]
        if is_section_mapping(kind):
            empty = [name for name in entries if name.rpartition(".")[0] == key]
            advice = "write {}: {{}} for defaults, or remove it"
        else:
            empty, advice = (entries if is_mapping(kind) else []), "give it one, or remove it"
        if empty:
            raise UserError(f"{path}: {empty[0]} has no value; {advice.format(empty[0].rpartition('.')[2])}")
    return values


def _leave_out(node: yaml.MappingNode, keys: Iterable[str], prefix: str = "") -> None:
    """Remove settings from a file's node."""
    node.value = [(name, value) for name, value in node.value if f"{prefix}{name.value}" not in keys]
    for name, value in node.value:
        if isinstance(value, yaml.MappingNode):
            _leave_out(value, keys, f"{prefix}{name.value}.")


def of_override(override: str, schema: type) -> dict[str, Any]:
    """The settings of `key=value`: one, or several if the key is a section. Raises UserError with the override."""
    key, equals, text = override.partition("=")
    name = f"override {quoted(override)}"
    parts, entry = _parts(key, schema)
    if not equals or not key or not all(part.isidentifier() for part in parts):
        raise UserError(f"{name} must look like section.key=value, for example optimizer.lr=1e-5")
    node = _value(key, text, schema, name)
    for part in reversed([*parts, *entry]):
        node = yaml.MappingNode(MAPPING, [(yaml.ScalarNode(TEXT, part), node)])
    return dict(_walk(node, schema, lambda _: name))


def _parts(key: str, schema: type) -> tuple[list[str], list[str]]:
    """The names in a dotted key, and apart from them those within a setting that is a mapping: an entry, and a key of its section."""
    for known, kind in leaves(schema):
        if is_mapping(kind) and key.startswith(f"{known}."):
            entry = key.removeprefix(f"{known}.")
            return known.split("."), entry.split(".") if is_section_mapping(kind) else [entry]
    return key.split("."), []


def _value(key: str, text: str, schema: type, name: str) -> yaml.Node:
    """The text of an override as a node. Lists and sections are YAML; everything else is taken as written."""
    kinds = dict(leaves(schema))
    section = any(known.startswith(f"{key}.") for known in kinds)
    free = any(
        is_mapping(kind) and key.startswith(f"{known}.") and not _is_text(kind)
        for known, kind in kinds.items()
    )
    is_yaml = (
        section or (free and text[:1] in "{[\"'") or is_list(kinds.get(key)) or is_mapping(kinds.get(key))
    )
    if not is_yaml:
        return as_written(text)
    try:
        return parse(text) or as_written("")
    except ValueError:
        raise UserError(f"{name}: the value is not valid YAML; write a list as in [0.8,1.2]") from None


def _is_text(kind: Any) -> bool:
    """Whether the entries of a mapping are texts."""
    return entry_type(kind) is str


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
        if is_mapping(section):
            yield from _entries(key, value, entry_type(section), place, root)
            continue
        if not is_dataclass(section):
            yield key, _value_of(items[name], key, value, place)
            continue
        if not isinstance(value, yaml.MappingNode):
            first = f"{key}.{fields(section)[0].name}"
            raise UserError(f"{place(key_node)}: '{key}' is a section and must have keys such as {first}")
        yield from _walk(value, section, place, root, f"{key}.")


def _entries(key: str, node: yaml.Node, kind: Any, place: Place, root: Any) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting in the entries of a mapping; None removes the entry."""
    if is_null(node):
        yield key, None
        return
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{place(node)}: {key} must be names with values, as {key}.NAME=VALUE")
    seen = set()
    for name_node, value in node.value:
        if not isinstance(name_node, yaml.ScalarNode):
            raise UserError(f"{place(name_node)}: a key must be a name, not a list or a section")
        name = f"{key}.{name_node.value}"
        if name in seen:
            raise UserError(f"{place(name_node)}: '{name}' is given twice; remove one")
        seen.add(name)
        if is_dataclass(kind) and (fault := name_fault(name_node.value)) is not None:
            raise UserError(f"{place(name_node)}: {key} {fault}")
        if is_dataclass(kind) and isinstance(value, yaml.MappingNode) and not value.value:
            yield _default_of(name, kind)  # an entry of defaults
            continue
        if is_dataclass(kind) and isinstance(value, yaml.MappingNode):
            yield from _walk(value, kind, place, kind, f"{name}.")
            continue
        try:
            if is_null(value):
                yield name, None
            elif is_dataclass(kind):
                yield f"{name}.{fields(kind)[0].name}", convert(value, str)
            else:
                yield name, free_value(value) if kind is Any else convert(value, kind)
        except ValueError as error:
            raise UserError(f"{place(value)}: {name} {error}") from None


def _default_of(entry: str, section: Any) -> tuple[str, Any]:
    """(dotted key, value) of the first setting of a section that has a default, or is required."""
    item = next(item for item in fields(section) if item.default not in (None, MISSING))
    return f"{entry}.{item.name}", item.default


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
    if key in REPLACED:
        return f"{key} is now {REPLACED[key]}"
    if "." in name:
        known = [setting for setting, _ in leaves(root) if "." in setting]
        meant = [setting for setting in (name, key) if setting in known] or get_close_matches(key, known, n=1)
        section, _, setting = (meant or known)[0].rpartition(".")
        return f"{quoted(name)} is not one key; write '{setting}' in the section '{section}:'"
    nearest = nearest_key(key, root, () if prefix else siblings)
    keys = ", ".join(prefix + sibling for sibling in siblings)
    hint = f"did you mean '{nearest}'?" if nearest else f"keys here are: {keys}"
    return f"unknown key {quoted(key)}; {hint}"
