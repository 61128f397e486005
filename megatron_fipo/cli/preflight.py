"""The `preflight` command: check all nodes of a job before anything is started on them."""

import argparse
import os
from dataclasses import fields
from typing import Any

from megatron_fipo.cli.arguments import Parser, Subparsers, add_command, option_help, path
from megatron_fipo.fields import rule_of
from megatron_fipo.node.preflight.limits import PreflightLimits

PREFLIGHT_HELP = """\
    Check all nodes of a job in less than two minutes, before Ray and training start on them: GPUs and their
    health, a matrix product, free space, ulimits, clocks, versions, the shared folder, and the bandwidth of
    each pair of nodes and of an all-reduce.

    Under Slurm it runs once on each node; the first node prints a table, and one sentence for each fault that
    names the node, what was measured, what is needed and the fix. Outside Slurm it checks this machine, or
    the nodes of --nodes, on each of which it is started with its --rank.

    Exits with code 2 if there is a fault. Without GPUs the defaults are lower: /tmp 2 GiB, /dev/shm 1 GiB,
    4,096 open files, no bandwidth.

    examples:
      megatron-fipo preflight
      srun --ntasks-per-node=1 megatron-fipo preflight --run-dir runs/mine --bad-nodes bad.txt
      megatron-fipo preflight --nodes a,b --rank 0 --head 10.0.0.1:20000
"""


def add_preflight(commands: Subparsers) -> None:
    """Add `preflight` to the command line."""
    command = add_command(commands, "preflight", "check all nodes of a job before it starts", PREFLIGHT_HELP)
    command.add_argument(
        "--run-dir",
        metavar="DIR",
        type=path,
        help="folder that all nodes must share; a file is written there",
    )
    command.add_argument(
        "--bad-nodes", metavar="FILE", type=path, help="write the names of the nodes to exclude, one per line"
    )
    command.add_argument("--json", metavar="FILE", type=path, help="write all measurements and faults")
    command.add_argument("--nodes", metavar="A,B,...", help="names of the nodes (default: those of srun)")
    command.add_argument("--rank", metavar="N", type=int, help="which of --nodes this one is, from 0")
    command.add_argument(
        "--head",
        metavar="HOST[:PORT]",
        help="where the first node listens (default: its name, and a port derived from the job)",
    )
    _add_limits(command)
    command.set_defaults(handler=run_preflight)


def _add_limits(command: Parser) -> None:
    """An option for each field of `PreflightLimits`."""
    group = command.add_argument_group("thresholds and time limits")
    docs = option_help(PreflightLimits)
    for item in fields(PreflightLimits):
        group.add_argument(
            f"--{item.name.replace('_', '-')}",
            metavar="VALUE",
            type=item.type,
            default=argparse.SUPPRESS,
            help=f"{docs[item.name]} {str(rule_of(item)).capitalize()}. Default: {item.default}",
        )


def run_preflight(arguments: argparse.Namespace) -> int:
    """Take part in the preflight; on the head also judge, print and write. Returns 2 if there is a fault."""
    from megatron_fipo.errors import UserError
    from megatron_fipo.node.preflight.allocation import from_options, from_slurm
    from megatron_fipo.node.preflight.limits import limits_for
    from megatron_fipo.outputs import check_output_file

    if (arguments.nodes is None) != (arguments.rank is None):
        raise UserError("--nodes and --rank belong together; give both, or none of them under srun")
    if arguments.nodes is None:
        allocation = from_slurm(os.environ, arguments.head)
    else:
        allocation = from_options(arguments.nodes.split(","), arguments.rank, arguments.head)
    chosen = _chosen_limits(arguments)
    try:
        limits = limits_for(True, True, chosen)
    except ValueError as error:
        raise UserError(f"--{str(error).replace('_', '-')}") from error
    if allocation.rank == 0:
        for option, file in (("--bad-nodes", arguments.bad_nodes), ("--json", arguments.json)):
            if file is not None:
                check_output_file(file, option)
    from megatron_fipo.node.preflight.run import measure

    found = measure(allocation, limits, arguments.run_dir)
    return 0 if found is None else _conclude(found, chosen, arguments)


def _chosen_limits(arguments: argparse.Namespace) -> dict[str, Any]:
    """The limits that were given, and the number of GPUs that Slurm has allocated on this node."""
    from megatron_fipo.node.slurm_variables import optional_number

    chosen = {
        item.name: getattr(arguments, item.name) for item in fields(PreflightLimits) if item.name in arguments
    }
    allocated = optional_number(os.environ, "SLURM_GPUS_ON_NODE")
    return chosen if allocated is None else {"gpus_per_node": allocated, **chosen}


def _conclude(found: Any, chosen: dict[str, Any], arguments: argparse.Namespace) -> int:
    """On the head."""
    import json

    from megatron_fipo.node.preflight.facts import to_json
    from megatron_fipo.node.preflight.judge import bad_nodes, judge
    from megatron_fipo.node.preflight.limits import limits_for
    from megatron_fipo.node.preflight.render import output_console, print_preflight
    from megatron_fipo.outputs import write_output

    limits = limits_for(found.has_gpus or bool(chosen.get("gpus_per_node")), found.between_gpus, chosen)
    faults = judge(found, limits)
    if arguments.bad_nodes is not None:
        lines = "".join(f"{name}\n" for name in bad_nodes(faults, found.names))
        write_output(arguments.bad_nodes, lines)
    if arguments.json is not None:
        report = {
            "limits": to_json(limits),
            "faults": [to_json(fault) for fault in faults],
            **to_json(found),
        }
        write_output(arguments.json, json.dumps(report, indent=1) + "\n")
    print_preflight(found, faults, output_console())
    return 2 if faults else 0
