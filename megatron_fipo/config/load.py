"""YAML and `key=value` overrides into the dataclasses of `schema`, with errors that name the key and its source."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

from megatron_fipo.config.keys import leaves, settings
from megatron_fipo.config.schema import Config
from megatron_fipo.errors import UserError
from megatron_fipo.fields import REQUIRED, FilePath, expand_home, first_violation, rule_of

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
        values.update(of_override(override, schema))
    required = [key for key, item in settings(schema) if item.default == REQUIRED]
    if missing := sorted(key for key in required if values.get(key, REQUIRED) == REQUIRED):
        name = path or "the configuration"
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


def _expand_paths(values: dict[str, Any], schema: type, note: Note) -> None:
    """Replace a leading `~` in the values of path settings."""
    expanded = {}
    for key, item in settings(schema):
        if isinstance(rule_of(item), FilePath) and str(values.get(key, "")).startswith("~"):
            try:
                expanded[key] = expand_home(values[key])
            except ValueError as error:
                raise UserError(f"{key}: {error}") from None
    if expanded:
        values.update(expanded)
        note(f"~ is the home folder: {', '.join(f'{key}={value}' for key, value in expanded.items())}")


def _build(schema: type, values: dict[str, Any], prefix: str = "") -> Any:
    """An instance of a section, which may refuse its values with a ValueError."""
    arguments = {}
    for item in fields(schema):
        key = f"{prefix}{item.name}"
        if is_dataclass(item.type):
            arguments[item.name] = _build(item.type, values, f"{key}.")  # type: ignore[arg-type]
        elif key in values:
            arguments[item.name] = values[key]
    try:
        return schema(**arguments)
    except ValueError as error:
        raise UserError(f"{prefix}{error}") from None
