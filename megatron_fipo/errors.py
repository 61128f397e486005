"""The exception that the command line prints as one sentence instead of a traceback."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RAY_LOGS_VARIABLE = "MEGATRON_FIPO_RAY_LOGS"
"""Environment variable of driver, ranks and engines with the folder of Ray's logs, if it is not Ray's default."""
LOG_DIR_VARIABLE = "MEGATRON_FIPO_LOG_DIR"
"""Environment variable with the folder into which a job copies the logs of all its nodes, if it does."""


class UserError(Exception):
    """An error that the user can fix.

    The message is one sentence that names the key, row, file or rank, and how to fix it. The command line
    prints it and exits with code 2. All other exceptions propagate with their traceback.
    """

    trace: str = ""
    """The traceback of code that the user brings, if that raised; printed below the sentence."""


class LostError(UserError):
    """Something of the cluster was lost: a rank, a node, a checkpoint writer, Ray. The last checkpoint is to be resumed.

    The command exits with code 86.
    """


def ray_logs() -> str:
    """The folder in which Ray keeps the output of its processes, on each node."""
    return os.environ.get(RAY_LOGS_VARIABLE, "/tmp/ray/session_latest/logs")


def logs_place(node: str | None = None) -> str:
    """Where the output of Ray's processes is, for a message: the job's folder, else Ray's on `node`, if one is meant."""
    job = os.environ.get(LOG_DIR_VARIABLE)
    return job or ray_logs() + (f" on {node}" if node else "")


def first_line(error: BaseException) -> str:
    """The first line of an error's message without its full stop, or its type if it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def one_line(error: BaseException) -> str:
    """All lines of an error's message in one, without its full stop, or its type if it has no message."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def listed(items: Sequence[str], limit: int, total: int | None = None) -> str:
    """The first `limit` items for a message, and how many others there are (of `total`, by default of all `items`)."""
    others = (len(items) if total is None else total) - limit
    return ", ".join(items[:limit]) + (f" and {others:,} more" if others > 0 else "")


def shown(value: Any) -> str:
    """A value for a message, with its type, in at most about 60 characters of ASCII."""
    try:
        text = ascii(value)
    except Exception:  # the `__repr__` of an unknown object
        text = "an object"
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an `OSError` while `path` is written into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free disk space or fix the folder, "
            "then run the same command again"
        ) from error
