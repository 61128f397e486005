"""The `plan` command: memory, time and cost of a run before it is paid for."""

import argparse
from typing import TYPE_CHECKING

from megatron_fipo.cli.arguments import Subparsers, add_command, add_overrides, positive
from megatron_fipo.cli.case_options import add_case_options, load_case
from megatron_fipo.errors import UserError

if TYPE_CHECKING:
    from megatron_fipo.plan.case import Case
    from megatron_fipo.plan.plan import Plan

PLAN_HELP = """\
    Estimate what a run needs, without a GPU and without starting anything: memory of a trainer rank by part,
    cache of the engines, host memory of a node, the time of each phase of an iteration, tokens per second and
    GPU, what limits it, and the time of the complete run.

    Each estimate has an interval; the last lines name what it was calibrated on, and what was not calibrated.
    A layout that does not fit is refused, with the largest part and the nearest layout that fits.

    --search tries the parallel layouts on the same number of GPUs (or on --gpus), divided between trainer and
    engines, in each mode, and prints the fastest that fit, with the settings to copy.

    examples:
      megatron-fipo plan examples/qwen2.5-32b/fipo.yaml
      megatron-fipo plan examples/qwen2.5-32b/fipo.yaml --search --gpus 128 --response-start 4000 --response-end 10000
      megatron-fipo plan mine.yaml --machine mine-h100.yaml parallel.data_parallel_size=4
"""


def add_plan(commands: Subparsers) -> None:
    """Add `plan` to the command line."""
    command = add_command(commands, "plan", "estimate memory, time and cost of a run", PLAN_HELP)
    command.add_argument("config", metavar="CONFIG", help="YAML file as for train")
    add_overrides(command, "parallel.data_parallel_size=2 rollout.num_engines=8")
    command.add_argument("--search", action="store_true", help="look for faster layouts that fit")
    command.add_argument(
        "--gpus", metavar="N", type=positive, help="GPUs of the search (default: those of the configuration)"
    )
    add_case_options(command)
    command.set_defaults(handler=run_plan)


def run_plan(arguments: argparse.Namespace) -> int:
    if arguments.gpus and not arguments.search:
        raise UserError("--gpus is the number of GPUs of a search; add --search")
    case = load_case(arguments)
    if arguments.search:
        return _search(case, arguments.gpus or case.devices)
    print_case(case)
    return 0


def print_case(case: "Case") -> None:
    """Print the plan of a case whose settings are valid. UserError if it cannot fit its machine."""
    from rich.console import Console

    from megatron_fipo.plan.plan import make_plan, make_times
    from megatron_fipo.plan.render import print_plan

    plan = make_plan(case)
    fatal = _misfit(case, plan)
    print_plan(plan, None if fatal else make_times(case), Console())
    if fatal:
        raise UserError(fatal)


def check_fit(case: "Case") -> None:
    """As `print_case` without printing: UserError if the case cannot fit its machine."""
    from megatron_fipo.plan.plan import make_plan

    if fatal := _misfit(case, make_plan(case)):
        raise UserError(fatal)


def _misfit(case: "Case", plan: "Plan") -> str | None:
    """Why a case cannot fit its machine, with the nearest layout that does; None if it can."""
    fatal = [misfit.reason for misfit in plan.misfits if misfit.fatal]
    return f"{'; '.join(fatal)}. {_nearest(case)}" if fatal else None


def _search(case: "Case", devices: int) -> int:
    from rich.console import Console

    from megatron_fipo.plan.iteration import iteration
    from megatron_fipo.plan.render_search import print_search
    from megatron_fipo.plan.search import search

    found = search(case, devices)
    if not found:
        raise UserError(
            f"no layout fits on {devices} GPUs of {case.machine.name}; take more GPUs, or lower rollout.max_response_length"
        )
    print_search(case, found, iteration(case).rate.value, Console())
    return 0


def _nearest(case: "Case") -> str:
    from megatron_fipo.plan.render_search import overrides
    from megatron_fipo.plan.search import nearest_fit

    nearest = nearest_fit(case)
    if nearest is None:
        return (
            f"No layout of the trainer fits on its {case.trainer_devices} GPUs; take more (--search --gpus N)"
        )
    if not nearest:
        return "The trainer fits; change the engines"
    return f"The nearest trainer layout that fits: {overrides(nearest)}"
