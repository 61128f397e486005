"""The command line.

Each command imports heavy packages only once its settings are valid, so errors in them appear at once.
"""

from collections.abc import Sequence

from megatron_fipo.cli.arguments import Parser
from megatron_fipo.cli.calibrate import add_calibrate
from megatron_fipo.cli.check_task import add_check_task
from megatron_fipo.cli.commands import (
    add_config,
    add_doctor,
    add_evaluate,
    add_report,
    add_sft,
    add_train,
)
from megatron_fipo.cli.convert import add_convert
from megatron_fipo.cli.data import add_data
from megatron_fipo.cli.launch import add_launch
from megatron_fipo.cli.plan import add_plan
from megatron_fipo.cli.preflight import add_preflight
from megatron_fipo.cli.simulate import add_simulate
from megatron_fipo.cli.streams import ReaderGone, checked_output, say
from megatron_fipo.cli.study import add_study
from megatron_fipo.driver.cluster_loss import leave_if_lost
from megatron_fipo.errors import LostError, UserError
from megatron_fipo.exit_codes import DONE, INTERRUPTED, LOST, USER_ERROR


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code, one of `exit_codes.py`; errors with one sentence on stderr."""
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
        say(f"{error}\n{error.trace}" if error.trace else str(error))
        return LOST if isinstance(error, LostError) else USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    except ReaderGone:
        return DONE


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
    add_plan(commands)
    add_simulate(commands)
    add_evaluate(commands)
    add_sft(commands)
    add_report(commands)
    add_study(commands)
    add_doctor(commands)
    add_preflight(commands)
    add_calibrate(commands)
    add_convert(commands)
    add_data(commands)
    add_check_task(commands)
    add_config(commands)
    add_launch(commands)
    return parser
