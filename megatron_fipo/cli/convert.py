"""The `convert` command: a Hugging Face folder to a Megatron checkpoint folder, and back."""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_fipo.cli.arguments import Subparsers, add_command, path, positive
from megatron_fipo.errors import UserError
from megatron_fipo.outputs import check_new_folder

if TYPE_CHECKING:
    from megatron_fipo.checkpoint.convert.convert import Progress, Summary

CONVERT_HELP = """\
    Convert a model between Hugging Face format and a checkpoint folder in Megatron-Core's distributed format,
    offline: no GPU, one process, a few weights in memory at a time.

    The checkpoint folder does not depend on a parallel layout; any tensor-, pipeline- and expert-parallel size
    loads it. `to-hf` converts such a folder, or a checkpoint of a run (run_dir/checkpoints/iteration_...), of which
    it reads the model without the optimizer. Tokenizer, generation config and chat template are copied. The
    target appears only when it is complete.

    Tensors keep the dtype they are stored in, bit for bit. --dtype float32 and --dtype bfloat16 cast all of
    them; the number of rounded tensors is printed at the end. Without --dtype, a dtype that cannot be kept
    (float16) is refused.

    examples:
      megatron-fipo convert to-megatron Qwen2.5-32B converted/qwen2.5-32b
      megatron-fipo convert to-hf runs/mine/checkpoints/iteration_000100 exported --dtype bfloat16
      megatron-fipo convert to-megatron Qwen2.5-32B --dry-run --tensor-parallel 8 --pipeline-parallel 4
      megatron-fipo convert to-megatron Qwen3-30B-A3B --dry-run --tensor-parallel 2 --expert-parallel 8
"""
LINE_EVERY_S = 10.0
"""Time between progress lines if stderr is not a terminal."""


def add_convert(commands: Subparsers) -> None:
    """Add `convert to-megatron` and `convert to-hf` to the command line."""
    summary = "convert between Hugging Face and Megatron checkpoint folders"
    convert = add_command(commands, "convert", summary, CONVERT_HELP)
    directions = convert.add_subparsers(title="directions", metavar="DIRECTION", required=True)
    _add_direction(
        directions,
        "to-megatron",
        "Hugging Face folder to Megatron checkpoint folder",
        "folder with config.json and safetensors",
        run_to_megatron,
    )
    _add_direction(
        directions,
        "to-hf",
        "Megatron checkpoint folder to Hugging Face folder",
        "folder made by to-megatron, or a checkpoint of a run",
        run_to_hf,
    )


def _add_direction(
    directions: Subparsers,
    name: str,
    summary: str,
    source_help: str,
    handler: Callable[[argparse.Namespace], int],
) -> None:
    command = add_command(directions, name, summary, CONVERT_HELP)
    command.set_defaults(handler=handler)
    command.add_argument("source", metavar="SRC", type=path, help=source_help)
    command.add_argument("target", metavar="DST", type=path, nargs="?", help="folder to make; must not exist")
    command.add_argument(
        "--dtype",
        choices=("keep", "bfloat16", "float32"),
        default="keep",
        help="of all tensors (default: keep, bit for bit)",
    )
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="print every tensor's name in both formats, its shape, and each rank's shard (experts of a layer in one "
        "line); "
        "needs config.json only, writes nothing",
    )
    for dimension, meaning in (
        ("tensor", "ranks that share a matrix"),
        ("pipeline", "ranks that share the layers"),
        ("expert", "ranks that share the experts of a layer, of the ranks of a pipeline stage"),
        ("expert-tensor", "ranks that share a matrix of an expert"),
    ):
        command.add_argument(
            f"--{dimension}-parallel",
            metavar="N",
            type=positive,
            default=1,
            help=f"{meaning}, for --dry-run (default 1)",
        )
    command.add_argument(
        "--virtual-pipeline-parallel",
        metavar="N",
        type=positive,
        help="model chunks of each pipeline rank, for --dry-run",
    )


def run_to_megatron(arguments: argparse.Namespace) -> int:
    if arguments.dry_run:
        return _print_map(arguments.source, arguments)
    target = _target(arguments)
    from megatron_fipo.checkpoint.convert.convert import to_megatron

    start = time.monotonic()
    with progress_display() as update:
        summary = to_megatron(arguments.source, target, arguments.dtype, update)
    return _print_summary(summary, target, time.monotonic() - start)


def run_to_hf(arguments: argparse.Namespace) -> int:
    if arguments.dry_run:
        return _print_map(arguments.source / "hf", arguments)
    target = _target(arguments)
    from megatron_fipo.checkpoint.convert.convert import to_hf

    start = time.monotonic()
    with progress_display() as update:
        summary = to_hf(arguments.source, target, arguments.dtype, update)
    return _print_summary(summary, target, time.monotonic() - start)


def _target(arguments: argparse.Namespace) -> Path:
    if arguments.target is None:
        raise UserError("convert needs DST, the folder to make (only --dry-run works without)")
    source, target = (Path(os.path.realpath(folder)) for folder in (arguments.source, arguments.target))
    if source in target.parents:
        raise UserError(f"DST {arguments.target} is inside SRC {arguments.source}; choose a folder outside")
    check_new_folder(arguments.target, "DST")
    return arguments.target


def _print_map(folder: Path, arguments: argparse.Namespace) -> int:
    from megatron_fipo.checkpoint.convert.describe import describe_map
    from megatron_fipo.config import ParallelConfig
    from megatron_fipo.config.divisibility import check_divisibility
    from megatron_fipo.families.registry import read_model_config

    family, architecture = read_model_config(folder)
    tensor, expert = arguments.tensor_parallel, arguments.expert_parallel
    expert_tensor = arguments.expert_tensor_parallel
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor,
        sequence_parallel=tensor > 1,  # changes no shard; experts need it
        pipeline_model_parallel_size=arguments.pipeline_parallel,
        virtual_pipeline_model_parallel_size=arguments.virtual_pipeline_parallel,
        # As few ranks as experts need.
        data_parallel_size=math.lcm(tensor, expert * expert_tensor) // tensor,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=expert_tensor,
    )
    check_divisibility(architecture, parallel)
    for line in describe_map(family, architecture, parallel):
        print(line)
    return 0


def _print_summary(summary: "Summary", target: Path, seconds: float) -> int:
    from rich.filesize import decimal

    size, rate = decimal(summary.bytes), decimal(int(summary.bytes / max(seconds, 1e-9)))
    print(f"wrote {target}: {summary.tensors} tensors, {size} in {seconds:.1f} s ({rate}/s)")
    if summary.rounded:
        print(
            f"rounded to the dtype asked for: {len(summary.rounded)} of Megatron's parameters, "
            f"for example {min(summary.rounded)}"
        )
    return 0


@contextmanager
def progress_display(line_every_s: float = LINE_EVERY_S) -> Iterator["Progress"]:
    """Show progress on stderr with bytes and time left.

    On a terminal this is a bar, otherwise a line every `line_every_s` seconds.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _ProgressLines(line_every_s).update
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bars:

        def update(phase: str, done: int, total: int) -> None:
            if not bars.tasks or bars.tasks[-1].description != phase:
                bars.add_task(phase, total=total)
            bars.update(bars.tasks[-1].id, completed=done)

        yield update


class _ProgressLines:
    """Progress as lines for a log file: one every `every_s` seconds, and one when a phase is complete."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._phase = ""
        self._start = self._last_line = 0.0

    def update(self, phase: str, done: int, total: int) -> None:
        """As `checkpoint.convert.convert.Progress`."""
        from rich.filesize import decimal

        now = time.monotonic()
        if phase != self._phase:
            self._phase, self._start, self._last_line = phase, now, now
        if now - self._last_line >= self._every_s or (done == total and total):
            self._last_line, spent = now, now - self._start
            left = f", {spent * (total - done) / done:.0f} s left" if 0 < done < total else ""
            line = f"{phase}: {decimal(done)} of {decimal(total)} in {spent:.0f} s{left}"
            print(line, file=sys.stderr)
