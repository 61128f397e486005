"""Runs an answer in its process, after the limits are in force. Nothing here is trusted: the answer may change all of it."""

import atexit
import io
import json
import os
import sys
import threading
import types
from typing import Any

from values import plain

NAMES = (
    *(
        "string",
        "re",
        "datetime",
        "collections",
        "heapq",
        "bisect",
        "copy",
        "math",
        "random",
        "statistics",
        "itertools",
    ),
    *("functools", "operator", "io", "sys", "json", "builtins", "typing"),
)
"""Modules whose names a function finds without importing them, as LiveCodeBench does: answers to such problems rarely
import `List`."""


def run_answer(request: dict[str, Any]) -> int:
    """Run the program, or call its function: the exit status of this process, 0 if nothing was raised."""
    atexit._clear()
    sys.setrecursionlimit(max(sys.getrecursionlimit(), 50_000))
    standard_input = io.TextIOWrapper(io.BufferedReader(io.FileIO(0)), encoding="utf-8", errors="replace")
    sys.stdin = sys.__stdin__ = standard_input  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = _output(1)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _output(2)  # type: ignore[misc]
    sys.argv = ["answer.py"]
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    status = 0
    try:
        code = compile(request["source"], "answer.py", "exec")
        if request["call"] is None:
            exec(code, module.__dict__)
        else:
            _call(code, module, request["call"])
    except SystemExit as error:
        status = 0 if error.code in (None, 0) and request["call"] is None else 1
    except BaseException:
        status = 1
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread():
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    return status


def _call(code: types.CodeType, module: types.ModuleType, call: dict[str, Any]) -> None:
    """Write the value of an expression, or of a function with the arguments on standard input, as JSON."""
    for name in NAMES:
        exec(f"from {name} import *\nimport {name}", module.__dict__)
    module.__dict__["__name__"] = "answer"
    arguments = json.load(sys.stdin)
    result = os.dup(1)
    os.dup2(2, 1)  # what the answer prints is not its result
    exec(code, module.__dict__)
    if "expression" in call:
        value = eval(call["expression"], module.__dict__)
    else:
        owner: Any = module.__dict__.get("Solution")
        name = call["function"]
        value = getattr(owner(), name) if hasattr(owner, name) else module.__dict__[name]
        value = value(*arguments)
    with open(result, "w", encoding="utf-8") as file:
        json.dump(plain(value), file)


def _output(number: int) -> io.TextIOWrapper:
    raw = io.BufferedWriter(io.FileIO(number, "w"), 2**16)
    return io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace")
