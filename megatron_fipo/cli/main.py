"""The command line.

Each command imports heavy packages only once its settings are valid, so errors in them appear at once.
"""

from collections.abc import Sequence

from megatron_fipo.cli.arguments import Parser
from megatron_fipo.cli.commands import (
    add_config,
    add_doctor,
    add_evaluate,
    add_report,
    add_sft,
    add_train,
)
from megatron_fipo.cli.convert import add_convert
from megatron_fipo.cli.streams import ReaderGone, checked_output, say
from megatron_fipo.driver.cluster_loss import leave_if_lost
from megatron_fipo.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code.

    0: done. 2: an error that the user can fix, one sentence on stderr. 85: stopped by SIGTERM, SIGUSR1 or the
    time limit with the state saved; run the same command to resume. 130: stopped by Ctrl-C.
    """
    code = run(argv)
    leave_if_lost(code)
    return code


def run(argv: Sequence[str] | None) -> int:
    """As `main`, without the end of the process."""
    try:
        with checked_output():
            arguments = build_parser().parse_args(argv)
            return arguments.handler(arguments)
    except UserError as error:
        say(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    except ReaderGone:
        return 0


def build_parser() -> Parser:
    """The parser of all commands; parsing sets `handler` to the function that runs the command."""
    parser = Parser(
        prog="megatron-fipo",
        description="Train language models with FIPO (future-KL influenced policy optimization) on "
        "Megatron-Core.",
        epilog="Each command has its own --help. Start with: "
        "megatron-fipo train examples/countdown/fipo.yaml",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_train(commands)
    add_evaluate(commands)
    add_sft(commands)
    add_report(commands)
    add_doctor(commands)
    add_convert(commands)
    add_config(commands)
    return parser
