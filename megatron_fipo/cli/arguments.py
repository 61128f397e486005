"""Helpers to declare the arguments of a command. Imports nothing heavy, so that `--help` is fast."""

import argparse
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

from megatron_fipo.field_rules import FilePath
from megatron_fipo.fields import expand_home, field_docs

Handler = Callable[[argparse.Namespace], int]
"""Runs a command and returns its exit code."""
Subparsers = Any
"""What `ArgumentParser.add_subparsers` returns; argparse has no public name for it."""


class Parser(argparse.ArgumentParser):
    """Accepts options between positional arguments, as in `train CONFIG --dry-run key=value`.

    argparse supports this by `parse_known_intermixed_args`, but subcommands are always parsed by
    `parse_known_args`.
    """

    _intermixed = False

    def parse_known_args(self, args=None, namespace=None) -> Any:
        # Up to Python 3.11 the intermixed parse calls this method for each of its two passes.
        # Words after "--" are positional, which the intermixed parse forgets.
        if self._intermixed or self._subparsers is not None or "--" in (args or ()):
            return super().parse_known_args(args, namespace)
        self._intermixed = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._intermixed = False


def add_command(commands: Subparsers, name: str, summary: str, description: str) -> Parser:
    """Add a subcommand. `description` may be indented; its line breaks are kept."""
    return commands.add_parser(
        name,
        help=summary,
        description=dedent(description),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_overrides(command: Parser, example: str) -> None:
    """Add the `key=value` arguments, as `overrides`."""
    command.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        default=[],  # without it, argparse's usage errors call it required
        type=_override,
        help=f"settings that override the file, for example {example}",
    )


def option_help(settings: type) -> dict[str, str]:
    """The docstring of each field of a dataclass, as the help text of its option."""
    return {name: " ".join(doc.split()).replace("%", "%%") for name, doc in field_docs(settings).items()}


def _override(text: str) -> str:
    if "=" not in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} must look like section.key=value, for example optimizer.lr=1e-5"
        )
    return text


def path(text: str) -> Path:
    """The path of a file or folder; a leading `~` that the shell has left is replaced."""
    rule = FilePath()
    if (
        text not in rule
    ):  # as the empty text of a shell variable that is not set: Path("") is the current folder
        raise argparse.ArgumentTypeError(rule.refusal(text))
    try:
        return Path(expand_home(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value
