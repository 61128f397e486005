"""The `calibrate` command: measure this machine and write a file for the planner."""

import argparse
from pathlib import Path
from typing import Any

from megatron_fipo.cli.arguments import Subparsers, add_command, add_overrides, path
from megatron_fipo.cli.case_options import GPU_DEFAULT
from megatron_fipo.cli.streams import say

DEFAULT_OUTPUT = Path("machine.yaml")

CALIBRATE_HELP = """\
    Measure the rates of this machine in at most 3 minutes, and write them to a machine file for `megatron-fipo
    plan --machine FILE`.

    CONFIG is the configuration of the run to plan: its model and shapes are what is measured. Measured are
    matrix products (bfloat16 and FP8 on GPUs), attention, a layer's launches, copies, the disk of run_dir, an
    all-reduce over the GPUs of this node, and decoding by the rollout engine. Nothing is trained, and run_dir
    is not changed. The machine should be otherwise idle.

    On a machine without GPUs the file describes its CPU: one thread per rank, as in a run.

    A figure that cannot be measured here (the network between nodes, FP8 without Transformer Engine, decoding
    without the model's weights) is that of another machine, --base. It is listed with the reason, and marked
    `calibrated: false` in the file.

    examples:
      megatron-fipo calibrate examples/qwen2.5-32b/fipo.yaml --output h100.yaml
      megatron-fipo calibrate examples/countdown/fipo.yaml --output cpu.yaml rollout.engine=vllm
"""


def add_calibrate(commands: Subparsers) -> None:
    """Add `calibrate` to the command line."""
    command = add_command(commands, "calibrate", "measure this machine for the planner", CALIBRATE_HELP)
    command.add_argument("config", metavar="CONFIG", help="YAML file as for train")
    add_overrides(command, "parallel.tensor_model_parallel_size=8")
    command.add_argument(
        "--output",
        metavar="FILE",
        type=path,
        default=DEFAULT_OUTPUT,
        help=f"machine file to write (default: {DEFAULT_OUTPUT}); its name is the machine's",
    )
    command.add_argument(
        "--base",
        metavar="MACHINE",
        default=GPU_DEFAULT,
        help="machine, by name or file, whose figures stand in for what cannot be measured here "
        f"(default: {GPU_DEFAULT})",
    )
    command.set_defaults(handler=run_calibrate)


def run_calibrate(arguments: argparse.Namespace) -> int:
    """Measure, write the file, then print its figures."""
    from megatron_fipo.config import load_config, validate, with_placement
    from megatron_fipo.families.registry import read_model_config
    from megatron_fipo.outputs import check_output_file
    from megatron_fipo.plan.case import Case
    from megatron_fipo.plan.machine_file import load_machine, save_machine

    config = load_config(arguments.config, arguments.overrides, note=say)
    family, architecture = read_model_config(config.model.path)
    validate(config, architecture)
    case = Case(with_placement(config, 0), family, architecture, load_machine(arguments.base))
    check_output_file(arguments.output, "--output")
    from megatron_fipo.calibrate.run import calibrate

    found = calibrate(
        case, arguments.base, arguments.output.stem or "machine", lambda part: say(f"measuring: {part}")
    )
    save_machine(found.machine, arguments.output)
    _print(found)
    print(f"wrote {arguments.output}")
    return 0


def _print(found: Any) -> None:
    from rich.console import Console

    from megatron_fipo.calibrate.render import print_calibration

    print_calibration(found, Console(highlight=False))
