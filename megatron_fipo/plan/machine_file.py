"""Machines as YAML files: those shipped in `machines/`, and those that `megatron-fipo calibrate` writes.

    name: h200
    device: NVIDIA H200
    ...
    memory: {value: 4.2e+12, low: 4.0e+12, high: 4.4e+12, source: "copy, one H200, 2026-11-28", calibrated: true}

The keys are the fields of `Machine`; all but `calibrated` are required, so a file never leaves a number to be guessed.
Numbers are written as in configurations (`config/values.py`).
"""

import dataclasses
import typing
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from megatron_fipo.config.values import convert
from megatron_fipo.config.yaml_text import dump, parse
from megatron_fipo.errors import UserError
from megatron_fipo.field_rules import quoted
from megatron_fipo.outputs import write_output
from megatron_fipo.plan.machine import PRECISIONS, Figure, Machine

FOLDER = Path(__file__).parent / "machines"
LARGEST_FILE = 2**20
"""Bytes. A machine file has some 5,000."""
LEAST, MOST = 1e-12, 1e21
"""Bounds of every number: beyond them, times overflow or vanish."""
CALIBRATE = "`megatron-fipo calibrate` writes a complete file"


def machine_names() -> list[str]:
    """The shipped machines."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_machine(name: str) -> Machine:
    """A shipped machine by name, or a machine file by path.

    UserError naming the file, the key and the fix.
    """
    names = machine_names()
    path = FOLDER / f"{name}.yaml" if name in names else Path(name)
    try:
        if path.is_fifo():  # opening it would wait for a writer
            raise UserError(f"machine file {quoted(str(path))} is a pipe; give the path of a file")
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        nearest = get_close_matches(name, names, n=1)
        meant = f"did you mean {nearest[0]}?" if nearest else f"choose {', '.join(names)},"
        raise UserError(
            f"there is no machine {quoted(name)}: {meant} or give the path of a file that `calibrate` wrote"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"machine file {quoted(str(path))} cannot be read: {reason}; {CALIBRATE}") from None
    if len(content) > LARGEST_FILE:
        raise UserError(
            f"{path} is larger than {LARGEST_FILE:,} bytes, so it is no machine file; {CALIBRATE}"
        )
    try:
        node = parse(content)
    except ValueError as error:
        raise UserError(f"{path}{error}; {CALIBRATE}") from None
    return _build(Machine, node, f"{path}")


def save_machine(machine: Machine, path: Path) -> None:
    """Write a file that `load_machine` reads back equal; complete or not at all."""
    write_output(path, dump(dataclasses.asdict(machine)))


def _build(kind: type, node: yaml.Node | None, place: str) -> Any:
    """An instance of dataclass `kind` from a mapping with exactly its fields; `place` names it in errors."""
    items = {item.name: item for item in dataclasses.fields(kind)}
    values = _mapping(node, place, list(items))
    if missing := [
        name for name, item in items.items() if name not in values and item.default is dataclasses.MISSING
    ]:
        raise UserError(f"{place}: no value for {', '.join(missing)}; {CALIBRATE}")
    types = typing.get_type_hints(kind)
    result = kind(**{name: _value(types[name], value, f"{place}: {name}") for name, value in values.items()})
    if isinstance(result, Figure) and not result.low <= result.value <= result.high:
        raise UserError(
            f"{place} needs low <= value <= high, not {result.low:g}, {result.value:g} and {result.high:g}"
        )
    return result


def _value(kind: Any, node: yaml.Node, place: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(typing.cast(type, kind), node, place)
    if typing.get_origin(kind) is dict:
        item = typing.get_args(kind)[1]
        entries = _mapping(node, place, PRECISIONS)
        if not entries:
            raise UserError(f"{place} has no entry; give at least one of {', '.join(PRECISIONS)}")
        return {name: _build(item, entry, f"{place}.{name}") for name, entry in entries.items()}
    try:
        value = convert(node, kind)
    except ValueError as error:
        raise UserError(f"{place} {error}") from None
    if kind in (int, float) and not 0 < value < float("inf"):
        raise UserError(f"{place} must be a positive number, not {value}")
    if kind in (int, float) and not LEAST <= value <= MOST:
        raise UserError(f"{place} must be between {LEAST:g} and {MOST:g}, not {value:g}; {CALIBRATE}")
    if kind is str and not value.strip():
        raise UserError(f"{place} must not be empty")
    return value


def _mapping(node: yaml.Node | None, place: str, known: Sequence[str]) -> dict[str, yaml.Node]:
    """The entries of a mapping whose keys are all known, and given once."""
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{place} must have the keys {', '.join(known)}; {CALIBRATE}")
    entries: dict[str, yaml.Node] = {}
    for key, value in node.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else "a list or a section"
        if name not in known:
            nearest = get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"the keys are {', '.join(known)}"
            raise UserError(f"{place}: unknown key {quoted(name)}; {hint}")
        if name in entries:
            raise UserError(f"{place}: {name} is given twice; remove one")
        entries[name] = value
    return entries
