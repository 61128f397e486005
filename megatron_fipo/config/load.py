"""YAML and `key=value` overrides into the dataclasses of `schema`, with errors that name the key and its source."""

import difflib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

from megatron_fipo.config.schema import Config
from megatron_fipo.errors import UserError, first_line
from megatron_fipo.fields import first_violation

Schema = TypeVar("Schema")


@overload
def load_config(path: str | Path | None, overrides: list[str]) -> Config: ...
@overload
def load_config(path: str | Path | None, overrides: list[str], schema: type[Schema]) -> Schema: ...
def load_config(path: str | Path | None, overrides: list[str], schema: type = Config) -> Any:
    """Read a YAML file (None for none), then apply overrides such as `optimizer.lr=1e-5` in order.

    Values are YAML: `objective.influence_clip=[0.8,1.2]`, `objective.influence_clip=null`, `objective.half_life=.inf`.
    Returns a plain `schema` instance. Raises UserError for a file that is not a YAML mapping, an unknown key (with the
    nearest valid one), a value of the wrong type or outside its range or choices, and a missing required value.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    merged: Any = OmegaConf.structured(schema)
    sources = [] if path is None else [(str(path), _read_yaml(Path(path)))]
    sources += [(f"override '{override}'", _read_override(override)) for override in overrides]
    for source, values in sources:
        _refuse_unknown_keys(values, schema, source)
        try:
            merged = OmegaConf.merge(merged, values)
        except (
            OmegaConfBaseException,
            TypeError,
        ) as error:  # a TypeError for a mapping in the place of a list
            raise UserError(_explain(error, source)) from None
    name = str(path or "the configuration")
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise UserError(f"{name}: no value for {', '.join(missing)}; give it there or as key=value")
    except OmegaConfBaseException as error:
        raise UserError(_explain(error, name)) from None
    config = schema(**{item.name: _to_object(merged, item.name, name) for item in fields(schema)})
    if (violation := first_violation(config)) is not None:
        raise UserError(violation)
    return config


def save_config(config: Any, path: str | Path) -> None:
    """Write every value, defaults included, as YAML that `load_config` reads back equal. The file is complete or absent.

    Raises UserError if the file cannot be written (disk full, no permission).
    """
    from omegaconf import OmegaConf

    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=path.name, delete=False, encoding="utf-8"
        ) as file:
            temporary = file.name
            file.write(OmegaConf.to_yaml(OmegaConf.structured(config)))
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


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting of an instance, or (dotted key, type) of every setting of a schema class."""
    for item in fields(config):
        key = f"{prefix}{item.name}"
        value = item.type if isinstance(config, type) else getattr(config, item.name)
        if is_dataclass(value):
            yield from leaves(value, f"{key}.")
        else:
            yield key, value


def _read_yaml(path: Path) -> dict:
    import yaml
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        values = OmegaConf.load(path)
        if isinstance(values, DictConfig):
            return OmegaConf.to_container(values, resolve=False)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(_explain(error, str(path))) from None
    except FileNotFoundError:
        raise UserError(f"no configuration file {path}; ready-made ones are in examples/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the configuration file {path}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{path}{line} is not valid YAML: {getattr(error, 'problem', None) or error}"
        ) from None
    raise UserError(
        f"{path} must be a mapping of sections such as 'model:' and 'objective:', not a list or a single value"
    )


def _read_override(override: str) -> dict:
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    key, equals, _ = override.partition("=")
    if not equals or not key or not all(part.isidentifier() for part in key.split(".")):
        raise UserError(
            f"override '{override}' must look like section.key=value, for example optimizer.lr=1e-5"
        )
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([override]), resolve=False)  # type: ignore[return-value]
    except (yaml.YAMLError, OmegaConfBaseException):
        raise UserError(f"override '{override}': the value is not valid YAML; quote it") from None


def _refuse_unknown_keys(values: dict, schema: Any, source: str, root: Any = None, prefix: str = "") -> None:
    root = root or schema
    types: dict[str, Any] = {item.name: item.type for item in fields(schema)}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in types:
            raise UserError(f"{source}: unknown key '{key}'{_nearest_key(key, root, types, prefix)}")
        if not is_dataclass(types[name]):
            continue
        if not isinstance(value, dict):
            raise UserError(
                f"{source}: '{key}' is a section and must have keys such as {key}.{fields(types[name])[0].name}"
            )
        _refuse_unknown_keys(value, types[name], source, root, f"{key}.")


def _nearest_key(key: str, root: Any, siblings: Any, prefix: str) -> str:
    keys = [name for name, _ in leaves(root)] + ([] if prefix else list(siblings))
    leaf = key.rpartition(".")[2]
    same_leaf = [name for name in keys if name.rpartition(".")[2] == leaf]
    nearest = same_leaf[:1] or difflib.get_close_matches(key, keys, n=1, cutoff=0.7)
    if not nearest:
        by_leaf = {name.rpartition(".")[2]: name for name in keys}
        nearest = [by_leaf[name] for name in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.7)]
    if nearest:
        return f"; did you mean '{nearest[0]}'?"
    return f"; keys here are: {', '.join(prefix + name for name in siblings)}"


def _to_object(merged: Any, section: str, source: str) -> Any:
    """A section of the merged configuration as its data class, which may refuse its values with a ValueError."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        value = merged[section]
        return OmegaConf.to_object(value) if OmegaConf.is_config(value) else value
    except OmegaConfBaseException as error:
        raise UserError(_explain(error, source)) from None
    except ValueError as error:
        raise UserError(f"{section}.{error}") from None


def _explain(error: Any, source: str) -> str:
    """OmegaConf's message is its first line; the lines after it repeat the key and internals."""
    reason = first_line(error)
    return (
        f"{source}: {error.full_key}: {reason}" if getattr(error, "full_key", None) else f"{source}: {reason}"
    )
