"""The rows of a set with their places, whatever the set consists of: files in one of the formats, or a function of the user's."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_fipo.field_rules import is_import_path
from megatron_fipo.tasks.row_files import row_files
from megatron_fipo.tasks.row_function import function_rows
from megatron_fipo.tasks.row_reader import ROW_UNITS, Wanted, read_rows


class LocatedRow(NamedTuple):
    where: str
    """Names the row in errors."""
    label: str
    """Names it in messages about the set: its number, or file and number if there are several files."""
    number: int
    """Of one file as the file counts; of several files, from 0 over all of them."""
    values: Mapping[str, Any]


def located_rows(path: str | None, source: str, wanted: Wanted) -> Iterator[LocatedRow]:
    """Yield the rows of a set in order. `source` is a format of `ROW_UNITS`, which needs a path, or the import path of a function.

    Raises the errors of `row_files` and `read_rows`, or of `function_rows`.
    """
    if is_import_path(source):
        for number, values in function_rows(source, path, os.getcwd()):
            where = f"{path or source} row {number}" + ("" if path is None else f" of {source}")
            yield LocatedRow(where, str(number), number, values)
        return
    assert path is not None
    files, position = row_files(Path(path), source), 0
    for file in files:
        for number, values in read_rows(file, source, wanted):
            where = f"{file} {ROW_UNITS[source]} {number}"
            if len(files) == 1:
                yield LocatedRow(where, str(number), number, values)
            else:
                yield LocatedRow(where, f"{file.name}:{number}", position, values)
            position += 1
