"""Rows from a function of the user's: `data.source: package.module:function`.

def rows(path):          # the path of the set, or None
    yield {"prompt": "1+1", "reward_model": {"ground_truth": "2"}}
"""

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from megatron_fipo.errors import UserError, first_line
from megatron_fipo.hooks import HookError, load_hook, own_trace


def function_rows(source: str, path: str | None, folder: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number from 0, row) of what the function `source` gives for the path of a set; `folder` is searched for its module.

    Raises `HookError`, with the traceback of the user's code, if it cannot be called with one argument, raises, or gives nothing
    to iterate over, and `UserError` for a row that is not a dictionary with names as text.
    """
    name = f"data.source={source}"
    function = load_hook(source, "data.source", folder)
    if not callable(function):
        raise HookError(f"{name} is a {type(function).__name__}; name a function of the path of a set")
    try:
        inspect.signature(function).bind(path)
    except (TypeError, ValueError) as error:
        raise HookError(
            f"{name} cannot be called with one argument, the path of the set ({first_line(error)}); write def "
            f"{source.rpartition(':')[2]}(path)"
        ) from None
    return _checked(name, path, function)


def _checked(name: str, path: str | None, function: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    try:
        rows = function(path)
        if not isinstance(rows, Iterable) or isinstance(rows, (str, bytes, dict)):
            raise HookError(
                f"{name} returns a {type(rows).__name__} for {path}; yield one dictionary per row"
            )
        iterator = iter(rows)
    except HookError:
        raise
    except Exception as error:  # a user's function may raise anything
        raise _raised(name, path, number, error) from error
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise _raised(name, path, number, error) from error
        if not isinstance(row, dict) or not all(isinstance(key, str) for key in row):
            kind = "dictionary with names that are not text" if isinstance(row, dict) else type(row).__name__
            raise UserError(
                f"{name}: row {number} of {path} is a {kind}; yield dictionaries with the columns of a data file"
            )
        yield number, row
        number += 1


def _raised(name: str, path: str | None, number: int, error: Exception) -> HookError:
    return HookError(
        f"{name} raises {type(error).__name__} ({first_line(error)}) for row {number} of {path}; correct the function",
        own_trace(error),
    )
