"""Parts that a user brings, by import path: `package.module:name`.

A module is found as Python finds it, and in the folder in which the command was run, on every node.
"""

import importlib
import inspect
import sys
import traceback
from itertools import dropwhile
from pathlib import Path
from typing import Any

from megatron_fipo.errors import UserError, first_line

PACKAGE = str(Path(__file__).parent) + "/"


class HookError(UserError):
    """A hook that cannot be used. `trace` is the traceback of the user's own code, if it raised."""

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace


def load_hook(path: str, key: str, folder: str) -> Any:
    """The object at an import path, which the setting `key` names.

    `folder` is added to the module search path, last. Raises `HookError` if there is no such module or name, or if the
    module raises when it is imported.
    """
    module_name, _, name = path.partition(":")
    if folder not in sys.path:
        sys.path.append(folder)
    importlib.invalidate_caches()  # the file may be newer than this process
    try:
        module = importlib.import_module(module_name)
        found = getattr(module, name, None)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise HookError(
                f"{key}={path}: there is no module {error.name} in {folder} or the environment; run the command in its "
                "folder, or install its package"
            ) from None
        raise HookError(f"{key}={path}: {first_line(error)}; install it", own_trace(error)) from error
    except (Exception, SystemExit) as error:  # a module may raise anything
        raise HookError(
            f"{key}={path}: its module raises {type(error).__name__} ({first_line(error)}) when it is imported; correct it",
            own_trace(error),
        ) from error
    if found is None:
        place = getattr(module, "__file__", None) or f"{module_name}, which is a part of Python,"
        raise HookError(f"{key}={path}: the module {place} has no {name}; check the name")
    return found


def check_call(found: Any, hook: str, form: str) -> None:
    """Check that an object is a plain function of one positional argument.

    `hook` is the setting with its path, `form` the expected first line. Raises `HookError` with the reason if it is not one.
    """
    called = found if inspect.isroutine(found) else getattr(found, "__call__", None)  # noqa: B004
    fault = None
    if isinstance(found, type):
        fault = "is a class, which only makes an object when it is called; name a function"
    elif not callable(found):
        fault = f"is a {type(found).__name__}, which cannot be called; name a function"
    elif any(inspect.iscoroutinefunction(part) for part in (found, called)):
        fault = "is an async function, whose call returns before it has run; remove `async`, or use asyncio.run in it"
    elif any(test(part) for part in (found, called) for test in _GENERATOR_TESTS):
        fault = "is a generator (it has a `yield`), whose call returns no result; use `return`"
    elif not _takes_one(found):
        fault = f"has the arguments {inspect.signature(found)}, but it is called with one"
    if fault is not None:
        raise HookError(f"{hook} {fault}; the form is `{form}`")


_GENERATOR_TESTS = (inspect.isgeneratorfunction, inspect.isasyncgenfunction)


def _takes_one(function: Any) -> bool:
    """Whether a function may be called with one positional argument; true if that is not known, as of some compiled ones."""
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def own_trace(error: BaseException) -> str:
    """The traceback of an error without the frames of Ray, this package and Python's import machinery at its start."""
    frames = traceback.extract_tb(error.__traceback__)
    own = list(dropwhile(_is_foreign, frames))
    head = ["Traceback (most recent call last):\n"] if own else []
    lines = [*head, *traceback.format_list(own), *traceback.format_exception_only(error)]
    return "".join(lines).rstrip()


def _is_foreign(frame: traceback.FrameSummary) -> bool:
    prefixes = (PACKAGE, "<frozen importlib", importlib.__file__)
    return frame.filename.startswith(prefixes) or "/site-packages/ray/" in frame.filename
