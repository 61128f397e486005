"""The `convert` command: a Hugging Face folder to a Megatron checkpoint folder, and back."""

import argparse
import sys
import time
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any

from megatron_fipo.errors import UserError

if TYPE_CHECKING:
    from rich.progress import TaskID

    from megatron_fipo.checkpoint.convert.convert import Summary

CONVERT_HELP = """\
    Convert a model between Hugging Face format and a checkpoint folder in Megatron-Core's distributed format, offline:
    no GPU, one process, a few weights in memory at one time.

    The checkpoint folder does not depend on a parallel layout; any tensor and pipeline split loads it. `to-hf` takes such a
    folder, or a checkpoint of a run (run_dir/checkpoints/iteration_...), of which it reads the model and leaves the optimizer.
    Tokenizer, generation config and chat template come along. The target appears only when it is complete.

    Tensors keep the dtype they are stored in, bit for bit. --dtype float32 and --dtype bfloat16 cast all of them; how many were
    rounded is said at the end. Without it, a dtype that cannot be kept (float16) is refused.

    examples:
      megatron-fipo convert to-megatron Qwen2.5-32B converted/qwen2.5-32b
      megatron-fipo convert to-hf runs/mine/checkpoints/iteration_000100 exported --dtype bfloat16
      megatron-fipo convert to-megatron Qwen2.5-32B --dry-run --tensor-parallel 8 --pipeline-parallel 4
"""


class _Command(argparse.ArgumentParser):
    """Lets flags stand between SRC and DST, which argparse otherwise does not where DST is optional."""

    _parsing = False

    def parse_known_args(self, args=None, namespace=None) -> Any:
        if self._parsing:
            return super().parse_known_args(args, namespace)
        self._parsing = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._parsing = False


def add_convert(commands) -> None:
    """Add `convert to-megatron` and `convert to-hf` to the command line's subparsers."""
    convert = _add(commands, "convert", "convert between Hugging Face and Megatron checkpoint folders")
    directions = convert.add_subparsers(
        title="directions", metavar="DIRECTION", required=True, parser_class=_Command
    )
    to_megatron = _add(directions, "to-megatron", "Hugging Face folder to Megatron checkpoint folder")
    to_megatron.add_argument(
        "source", metavar="SRC", type=Path, help="folder with config.json and safetensors"
    )
    to_megatron.set_defaults(handler=run_to_megatron)
    to_hf = _add(directions, "to-hf", "Megatron checkpoint folder to Hugging Face folder")
    to_hf.add_argument(
        "source", metavar="SRC", type=Path, help="folder made by to-megatron, or a checkpoint of a run"
    )
    to_hf.set_defaults(handler=run_to_hf)
    for command in (to_megatron, to_hf):
        command.add_argument(
            "target", metavar="DST", type=Path, nargs="?", help="folder to make; must not exist"
        )
        command.add_argument(
            "--dtype",
            choices=("keep", "bfloat16", "float32"),
            default="keep",
            help="of all tensors (default: keep, bit for bit)",
        )
        command.add_argument(
            "--dry-run",
            action="store_true",
            help="print every tensor's name on both sides, its shape, and each rank's shard; needs config.json only, writes nothing",
        )
        for name, what in (
            ("tensor", "ranks that share a matrix"),
            ("pipeline", "ranks that share the layers"),
        ):
            command.add_argument(
                f"--{name}-parallel",
                metavar="N",
                type=_positive,
                default=1,
                help=f"{what}, for --dry-run (default 1)",
            )
        command.add_argument(
            "--virtual-pipeline-parallel",
            metavar="N",
            type=_positive,
            help="model chunks of each pipeline rank, for --dry-run",
        )


def _add(commands, name: str, summary: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=dedent(CONVERT_HELP),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def run_to_megatron(arguments: argparse.Namespace) -> int:
    if arguments.dry_run:
        return _print_map(arguments.source, arguments)
    target = _target(arguments)
    from megatron_fipo.checkpoint.convert.convert import to_megatron

    with Display() as display:
        summary = to_megatron(arguments.source, target, arguments.dtype, display.update)
    return _done(summary, target, display)


def run_to_hf(arguments: argparse.Namespace) -> int:
    if arguments.dry_run:
        return _print_map(arguments.source / "hf", arguments)
    target = _target(arguments)
    from megatron_fipo.checkpoint.convert.convert import to_hf

    with Display() as display:
        summary = to_hf(arguments.source, target, arguments.dtype, display.update)
    return _done(summary, target, display)


def _target(arguments: argparse.Namespace) -> Path:
    if arguments.target is None:
        raise UserError("convert needs DST, the folder to make (only --dry-run does without)")
    return arguments.target


def _print_map(folder: Path, arguments: argparse.Namespace) -> int:
    from megatron_fipo.checkpoint.convert.name_map import describe_map
    from megatron_fipo.config import ParallelConfig
    from megatron_fipo.config.divisibility import check_divisibility
    from megatron_fipo.families.registry import read_model_config

    family, architecture = read_model_config(folder)
    parallel = ParallelConfig(
        tensor_model_parallel_size=arguments.tensor_parallel,
        pipeline_model_parallel_size=arguments.pipeline_parallel,
        virtual_pipeline_model_parallel_size=arguments.virtual_pipeline_parallel,
    )
    check_divisibility(architecture, parallel)
    for line in describe_map(family, architecture, parallel):
        print(line)
    return 0


def _done(summary: "Summary", target: Path, display: "Display") -> int:
    from rich.filesize import decimal

    rate = summary.bytes / max(display.seconds, 1e-9)
    size = decimal(summary.bytes)
    print(
        f"wrote {target}: {summary.tensors} tensors, {size} in {display.seconds:.1f} s ({decimal(int(rate))}/s)"
    )
    if summary.rounded:
        print(
            f"rounded to the dtype asked for: {len(summary.rounded)} of Megatron's parameters, {min(summary.rounded)} among them"
        )
    return 0


class Display:
    """Progress with bytes and time left: a bar on a terminal, else a line every ten seconds."""

    LINE_EVERY_S = 10.0

    def __init__(self) -> None:
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
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console) if console.is_terminal else None
        self._what = ""
        self._task: TaskID | None = None
        self._started = self._begun = self._spoken = time.monotonic()
        self.seconds = 0.0
        """From beginning to end, once over."""

    def __enter__(self) -> "Display":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self._started
        if self._bar:
            self._bar.stop()

    def update(self, what: str, done: int, total: int) -> None:
        """As `checkpoint.convert.Progress`."""
        from rich.filesize import decimal

        now = time.monotonic()
        if what != self._what:
            self._what, self._begun, self._spoken = what, now, now
            self._task = self._bar.add_task(what, total=total) if self._bar else None
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=done)
        elif now - self._spoken >= self.LINE_EVERY_S or (done == total and total):
            self._spoken, spent = now, now - self._begun
            left = f", {spent * (total - done) / done:.0f} s left" if 0 < done < total else ""
            print(f"{what}: {decimal(done)} of {decimal(total)} in {spent:.0f} s{left}", file=sys.stderr)
