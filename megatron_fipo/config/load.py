"""YAML and `key=value` overrides into the dataclasses of `schema`, with errors that name the key and its source."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, overload

from megatron_fipo.config.keys import entry_type, is_mapping, is_section_mapping, leaves, settings
from megatron_fipo.config.schema import Config
from megatron_fipo.errors import UserError
from megatron_fipo.field_rules import FilePath
from megatron_fipo.fields import REQUIRED, expand_home, first_violation, rule_of

Schema = TypeVar("Schema")
Note = Callable[[str], None]
"""Takes a sentence for the user."""


@overload
def load_config(path: str | Path | None, overrides: list[str], *, note: Note = ...) -> Config: ...
@overload
def load_config(
    path: str | Path | None, overrides: list[str], schema: type[Schema], note: Note = ...
) -> Schema: ...
def load_config(
    path: str | Path | None, overrides: list[str], schema: type = Config, note: Note = lambda _: None
) -> Any:
    """Read a YAML file (None for none), then apply overrides such as `optimizer.lr=1e-5` in order; the last one wins.

    The declared type of a setting decides what its text means (`values.py`). Text is taken exactly as written; a list is
    written as in YAML, `objective.influence_clip=[0.8,1.2]`. `note` gets one sentence if a path began with `~`.

    Returns a plain `schema` instance. Raises UserError for a file that is not a YAML mapping, an unknown or repeated key
    (with the nearest valid one), a value of the wrong type or outside its range or choices, and a missing required value.
    """
    from megatron_fipo.config.source import of_file, of_override

    values: dict[str, Any] = {}
    if path is not None:
        values.update(of_file(Path(path), schema))
    for override in overrides:
        _update(values, of_override(override, schema), schema)
    return _checked(schema, values, path or "the configuration", note)


def load_stored_config(path: Path) -> Config:
    """Read what `save_config` wrote, in this or an earlier version. Raises UserError as `load_config`."""
    from megatron_fipo.config.source import of_file

    return _checked(Config, of_file(path, Config, stored=True), path)


def _checked(schema: type, values: dict[str, Any], name: str | Path, note: Note = lambda _: None) -> Any:
    """The instance with these settings by dotted key; `name` is their source."""
    required = [key for key, item in settings(schema) if item.default == REQUIRED]
    if missing := sorted(key for key in required if values.get(key, REQUIRED) == REQUIRED):
        raise UserError(f"{name}: no value for {', '.join(missing)}; give it there or as key=value")
    _expand_paths(values, schema, note)
    config = _build(schema, values)
    if (violation := first_violation(config)) is not None:
        raise UserError(violation)
    return config


def save_config(config: Any, path: str | Path) -> None:
    """Write every value, defaults included, as YAML that `load_config` reads back equal. The file is complete or absent.

    Raises UserError if the file cannot be written (disk full, no permission).
    """
    from megatron_fipo.config.yaml_text import dump

    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=path.name, delete=False, encoding="utf-8"
        ) as file:
            temporary = file.name
            file.write(dump(asdict(config)))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path}: {error.strerror}; free space there or choose another folder"
        ) from error


def differences(a: Any, b: Any) -> list[str]:
    """Dotted keys whose values differ between two configurations of the same schema, in schema order."""
    if type(a) is not type(b):
        raise ValueError(f"cannot compare {type(a).__name__} with {type(b).__name__}")
    left, right = dict(leaves(a)), dict(leaves(b))
    return [key for key, value in left.items() if value != right[key]]


def _update(values: dict[str, Any], others: dict[str, Any], schema: type) -> None:
    """Replace values by others; None removes an entry of a mapping, and the settings in it if it is a section."""
    sections = tuple(f"{key}." for key, item in settings(schema) if is_section_mapping(item.type))
    for key, value in others.items():
        if value is None and key.startswith(sections):
            for inner in [name for name in values if name.startswith(f"{key}.")]:
                del values[inner]
        values[key] = value


def _expand_paths(values: dict[str, Any], schema: type, note: Note) -> None:
    """Replace a leading `~` in the values of path settings."""
    expanded = {}
    for key in _path_keys(values, schema):
        if str(values[key]).startswith("~"):
            try:
                expanded[key] = expand_home(values[key])
            except ValueError as error:
                raise UserError(f"{key}: {error}") from None
    if expanded:
        values.update(expanded)
        note(f"~ is the home folder: {', '.join(f'{key}={value}' for key, value in expanded.items())}")


def _path_keys(values: dict[str, Any], schema: type) -> list[str]:
    """The keys of the values that are paths."""
    keys = []
    for key, item in settings(schema):
        if isinstance(rule_of(item), FilePath):
            keys.append(key)
        elif is_section_mapping(item.type):
            inner = [
                name for name, part in settings(entry_type(item.type)) if isinstance(rule_of(part), FilePath)
            ]
            entries = [name for name in values if name.startswith(f"{key}.")]
            keys += [name for name in entries if name.removeprefix(f"{key}.").partition(".")[2] in inner]
    return [key for key in keys if key in values]


def _build(schema: type, values: dict[str, Any], prefix: str = "") -> Any:
    """An instance of a section, which may refuse its values with a ValueError."""
    arguments = {}
    for item in fields(schema):
        key = f"{prefix}{item.name}"
        if is_dataclass(item.type):
            arguments[item.name] = _build(item.type, values, f"{key}.")  # type: ignore[arg-type]
        elif is_mapping(item.type):
            arguments[item.name] = _entries(key, entry_type(item.type), values)
        elif key in values:
            arguments[item.name] = values[key]
    try:
        return schema(**arguments)
    except ValueError as error:
        raise UserError(f"{prefix}{error}") from None


def _entries(key: str, kind: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The entries of a mapping, in the order in which they were first given."""
    given = {
        name.removeprefix(f"{key}."): value
        for name, value in values.items()
        if name.startswith(f"{key}.") and value is not None
    }
    if not is_dataclass(kind):
        return given
    entries, section = {}, cast(type, kind)
    for name in dict.fromkeys(inner.partition(".")[0] for inner in given):
        entries[name] = _build(section, values, f"{key}.{name}.")
        for inner, item in settings(section):
            if item.default == REQUIRED and getattr(entries[name], inner) == REQUIRED:
                raise UserError(f"no value for {key}.{name}.{inner}; give it as {key}.{name}={inner.upper()}")
    return entries
