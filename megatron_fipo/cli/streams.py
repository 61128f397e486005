"""Standard output and error of the command line: also if they are closed, on a full disk, or pipes without a reader."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, TextIO

from megatron_fipo.errors import UserError


class ReaderGone(Exception):
    """The reader of standard output has exited, as in `... | head`."""


class _Output:
    """Standard output. An error while writing is a `UserError` or `ReaderGone`; later output is then dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._reported():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._reported():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            _drop(self._stream)
            raise ReaderGone from None
        except OSError as error:
            _drop(self._stream)
            raise UserError(
                f"cannot write to standard output: {error.strerror or error}; redirect it to a file on a disk with free space"
            ) from None


@contextmanager
def checked_output() -> Iterator[None]:
    """Raise `UserError` in the body if standard output is closed or refuses a write, `ReaderGone` if nobody reads it."""
    if sys.stderr is None:  # closed by the caller; otherwise the next file to be opened would get its number
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        raise UserError("standard output is closed; redirect it to a file or to /dev/null")
    output = _Output(sys.stdout)
    with redirect_stdout(output):
        try:
            yield
        except SystemExit:  # the end of --help or of a usage error
            _write_errors()
            output.flush()
            raise
        except BaseException:  # which matters more than the rest of the output
            with suppress(UserError, ReaderGone):
                output.flush()
            raise
        output.flush()


def say(message: str) -> None:
    """Print a sentence on standard error, if that is possible."""
    with suppress(OSError):
        print(f"megatron-fipo: {message}", file=sys.stderr)
    _write_errors()


def _write_errors() -> None:
    try:
        sys.stderr.flush()
    except OSError:
        _drop(sys.stderr)


def _drop(stream: TextIO) -> None:
    """Let everything that is still written to the stream disappear, so that Python does not fail at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
