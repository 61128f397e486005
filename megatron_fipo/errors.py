"""The exception that the command line prints as one sentence instead of a traceback."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

RAY_LOGS_VARIABLE = "MEGATRON_FIPO_RAY_LOGS"
"""Environment variable of driver, ranks and engines with the folder of Ray's logs, if it is not Ray's default."""


class UserError(Exception):
    """An error that the user can fix.

    The message is one sentence that names the key, row, file or rank, and how to fix it. The command line
    prints it and exits with code 2. All other exceptions propagate with their traceback.
    """


def ray_logs() -> str:
    """The folder in which Ray keeps the output of its processes. Messages refer to it."""
    return os.environ.get(RAY_LOGS_VARIABLE, "/tmp/ray/session_latest/logs")


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
