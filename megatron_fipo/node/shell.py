"""Programs that the batch script calls: it evaluates the lines that begin with `fipo_` and reads the exit code."""

import sys
from collections.abc import Callable
from shlex import quote

from megatron_fipo.errors import UserError
from megatron_fipo.exit_codes import USER_ERROR


def answer(**values: object) -> None:
    """Print each value as the assignment of a shell variable; None and False are empty."""
    for name, value in values.items():
        text = "" if value is None or value is False else str(value)
        assert "\n" not in text, f"{name} would be cut at its line break"
        print(f"fipo_{name}={quote(text)}")


def exit_code(main: Callable[[], int]) -> int:
    """What `main` returns; 2 if it raises a `UserError`, whose sentence is printed on stderr."""
    try:
        return main()
    except UserError as error:
        print(f"megatron-fipo: {error}", file=sys.stderr)
        return USER_ERROR
