"""The `simulate` command: play a run through on paper, request by request."""

import argparse

from megatron_fipo.cli.arguments import Subparsers, add_command, add_overrides, path
from megatron_fipo.cli.case_options import add_case_options, add_fields, load_case, read_fields
from megatron_fipo.cli.streams import say
from megatron_fipo.simulate.operation import Operation

SIMULATE_HELP = """\
    Simulate a training run without GPUs: how long it takes, what trainer and engines wait for, and what losses
    cost. The driver's own collector and dispatch run over engines and ranks that take the planner's times
    (`megatron-fipo plan`); responses have assumed lengths.

    With --output it also writes a page: one iteration as a picture, and curves over the number of GPUs and over
    training. That takes some minutes for a large batch, without it less than one.

    examples:
      megatron-fipo simulate examples/qwen2.5-32b/fipo.yaml --machine h100-80gb
      megatron-fipo simulate examples/qwen2.5-7b-math/fipo.yaml --output simulated.html --response-start 1000
      megatron-fipo simulate mine.yaml rollout.mode=one_step_off --gpu-mtbf-hours 20000
"""


def add_simulate(commands: Subparsers) -> None:
    """Add `simulate` to the command line."""
    summary = "simulate a run: its time, what waits for what, and what losses cost"
    command = add_command(commands, "simulate", summary, SIMULATE_HELP)
    command.add_argument("config", metavar="CONFIG", help="YAML file, as for train")
    add_overrides(command, "rollout.num_engines=32 rollout.mode=one_step_off")
    command.add_argument(
        "--output", metavar="PAGE.html", type=path, help="also write an HTML page; it needs no network"
    )
    add_case_options(command)
    add_fields(command, "assumptions about the cluster", Operation)
    command.set_defaults(handler=run_simulate)


def run_simulate(arguments: argparse.Namespace) -> int:
    """Simulate, print the result and write the page."""
    from megatron_fipo.outputs import check_output_file

    case = load_case(arguments)
    operation = read_fields(Operation, arguments)
    if arguments.output is not None:
        check_output_file(arguments.output, "--output")

    from rich.console import Console

    from megatron_fipo.simulate.render import print_training
    from megatron_fipo.simulate.times import basis_of, times_of
    from megatron_fipo.simulate.training import simulate_training

    training = simulate_training(case, operation, lambda of, bound: times_of(of, operation, bound))
    print_training(training, operation, Console())
    if arguments.output is not None:
        from megatron_fipo.outputs import write_output
        from megatron_fipo.simulate.page import render_page
        from megatron_fipo.simulate.scaling import simulate_scaling

        say("simulating the same split on other numbers of GPUs for the page")
        scaling = simulate_scaling(case, operation, lambda of, bound: times_of(of, operation, bound))
        write_output(
            arguments.output, render_page(arguments.config, training, scaling, operation, basis_of(case))
        )
        print(f"wrote {arguments.output}")
    return 0
