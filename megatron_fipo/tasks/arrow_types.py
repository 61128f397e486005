"""Which columns of a parquet or Arrow file have values of JSON, and how only these are read."""

from collections.abc import Iterator, Sequence

import pyarrow
from pyarrow import types


def readable_fields(schema: pyarrow.Schema) -> tuple[list[str], list[str]]:
    """(columns whose values are those of JSON, the others). Fields of an object are named apart if it has both kinds."""
    readable: list[str] = []
    others: list[str] = []
    for column in schema:
        for name, is_readable in _fields(column.name, column.type):
            (readable if is_readable else others).append(name)
    return readable, others


def field_path(schema: pyarrow.Schema, name: str) -> str | None:
    """How a column or a dotted field of an object is selected: by its name, by the column if that is no object, or not at all."""
    if name in schema.names:
        return name
    column, *path = name.split(".")
    if column not in schema.names:
        return None
    kind = schema.field(column).type
    for part in path:
        if not types.is_struct(kind) or kind.get_field_index(part) < 0:
            return column
        kind = kind.field(part).type
    return name


def projected(batch: pyarrow.RecordBatch, names: Sequence[str]) -> pyarrow.RecordBatch:
    """The batch with these columns and fields of objects alone, as parquet files select them. Nothing is copied."""
    whole = [name for name in names if name in batch.schema.names]
    parts: dict[str, list[str]] = {}
    for name in names:
        if name not in batch.schema.names:
            column, _, path = name.partition(".")
            parts.setdefault(column, []).append(path)
    columns = {name: batch.column(name) for name in whole}
    columns |= {name: _only(batch.column(name), paths) for name, paths in parts.items() if name not in whole}
    return pyarrow.RecordBatch.from_arrays(list(columns.values()), names=list(columns))


def _only(array: pyarrow.StructArray, paths: Sequence[str]) -> pyarrow.StructArray:
    """An array of objects with some of their fields."""
    inner: dict[str, list[str]] = {}
    for path in paths:
        name, _, rest = path.partition(".")
        inner.setdefault(name, []).append(rest)
    fields = {
        name: array.field(name) if "" in rest else _only(array.field(name), rest)
        for name, rest in inner.items()
    }
    return pyarrow.StructArray.from_arrays(list(fields.values()), names=list(fields), mask=array.is_null())


def _fields(name: str, kind: pyarrow.DataType) -> Iterator[tuple[str, bool]]:
    """(dotted name, whether its values are those of JSON) of a column, or of its fields if they differ in that."""
    inner = (
        [pair for part in kind for pair in _fields(f"{name}.{part.name}", part.type)]
        if types.is_struct(kind)
        else []
    )
    if inner and not all(is_readable for _, is_readable in inner):
        yield from inner
    else:
        yield name, bool(inner) or _is_json(kind)


def _is_json(kind: pyarrow.DataType) -> bool:
    if types.is_dictionary(kind):
        return _is_json(kind.value_type)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_json(kind.value_type)
    if types.is_struct(kind):
        return all(_is_json(part.type) for part in kind)
    tests = (
        types.is_string,
        types.is_large_string,
        types.is_string_view,
        types.is_integer,
        types.is_floating,
        types.is_boolean,
        types.is_null,
    )
    return any(test(kind) for test in tests)
