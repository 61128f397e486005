"""The one exception that the command line prints as a sentence instead of a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RAY_LOGS = "/tmp/ray/session_latest/logs"
"""Where Ray keeps the output of its processes, unless its temporary folder was moved. Messages refer to it."""


class UserError(Exception):
    """A mistake that the user can mend: the message is one sentence that names the key, row, file or rank and the mend.

    The command line prints it and exits with code 2. Everything else propagates with its traceback.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without its full stop, to be put into a sentence; without a message, the error's type."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong with the disk while `path` is written into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; make room or mend the folder, then run the same command again"
        ) from error
