"""The options that `plan` and `simulate` share: a machine, and what is assumed about responses."""

import argparse
import typing
from dataclasses import fields
from typing import TYPE_CHECKING, TypeVar

from megatron_fipo.cli.arguments import Parser, option_help
from megatron_fipo.cli.streams import say
from megatron_fipo.errors import UserError
from megatron_fipo.plan.machine import DEFAULT_MACHINE
from megatron_fipo.plan.workload import Assumptions

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from megatron_fipo.config import Config
    from megatron_fipo.plan.case import Case
    from megatron_fipo.plan.machine import Machine

T = TypeVar("T", bound="DataclassInstance")
GPU_DEFAULT, CPU_DEFAULT = DEFAULT_MACHINE, "cpu"


def add_case_options(command: Parser) -> None:
    """Add `--machine` and an option for each field of `Assumptions`."""
    command.add_argument(
        "--machine",
        metavar="NAME|FILE",
        help="a shipped machine, or a file written by `calibrate` (default: this machine's GPUs, without any "
        f"{GPU_DEFAULT}, or {CPU_DEFAULT} for model.dtype=float32)",
    )
    add_fields(command, "assumptions about responses", Assumptions)


def add_fields(command: Parser, title: str, settings: "type[DataclassInstance]") -> None:
    """Add a group with an option for each field of a dataclass of numbers."""
    group = command.add_argument_group(title)
    docs = option_help(settings)
    for item in fields(settings):
        kind = next(kind for kind in (int, float) if kind in (item.type, *typing.get_args(item.type)))
        default = "" if item.default is None else f" Default: {item.default:,g}"
        group.add_argument(
            f"--{item.name.replace('_', '-')}",
            metavar="NUMBER",
            type=kind,
            default=argparse.SUPPRESS,
            help=docs[item.name] + default,
        )


def read_fields(settings: type[T], arguments: argparse.Namespace) -> T:
    """The dataclass of `add_fields` with the options that were given. UserError naming the option."""
    given = {item.name: getattr(arguments, item.name) for item in fields(settings) if item.name in arguments}
    try:
        return settings(**given)
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise UserError(f"--{name.replace('_', '-')} {rest}") from None


def load_case(arguments: argparse.Namespace) -> "Case":
    """The case of a command's CONFIG, overrides and options. UserError for whatever is wrong with them."""
    from megatron_fipo.config import load_config, validate

    config = load_config(arguments.config, arguments.overrides, note=say)
    case = read_case(config, arguments)
    validate(config, case.architecture)
    return case


def read_case(config: "Config", arguments: argparse.Namespace | None = None) -> "Case":
    """The case of a valid configuration, by default on this machine with the default assumptions.

    UserError for its model folder, an option or a machine.
    """
    arguments = arguments or argparse.Namespace(machine=None)
    from megatron_fipo.config import placement_note
    from megatron_fipo.environment import find_cards
    from megatron_fipo.families.registry import read_model_config
    from megatron_fipo.plan.case import case_of
    from megatron_fipo.plan.machine_file import load_machine

    assumptions = read_fields(Assumptions, arguments)
    cards = () if arguments.machine is not None or config.ray_address else find_cards()
    if note := placement_note(config, len(cards)):
        say(note)
    machine = _default_machine(config) if arguments.machine is None else load_machine(arguments.machine)
    return case_of(config, *read_model_config(config.model.path), machine, assumptions, len(cards))


def _default_machine(config: "Config") -> "Machine":
    """This machine's GPUs. float32 is planned for CPUs: no machine with GPUs has figures for it."""
    from megatron_fipo.environment import find_cards
    from megatron_fipo.plan.card_memory import machine_of
    from megatron_fipo.plan.machine_file import load_machine

    if config.model.dtype == "float32":
        return load_machine(CPU_DEFAULT)
    cards = find_cards()
    return machine_of(cards) if cards else load_machine(GPU_DEFAULT)
