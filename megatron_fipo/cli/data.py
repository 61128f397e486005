"""The command `data`: published data sets as the rows that training and evaluation read."""

import argparse
from pathlib import Path

from megatron_fipo.cli.arguments import Subparsers, add_command, path
from megatron_fipo.cli.streams import say

NAMES = ("dapo", "aime24", "aime25")


def add_data(commands: Subparsers) -> None:
    command = add_command(commands, "data", "make the training and evaluation files", DATA_HELP)
    command.add_argument("name", metavar="NAME", choices=NAMES, help=f"one of {', '.join(NAMES)}")
    command.add_argument(
        "--from",
        dest="source",
        metavar="PATH",
        type=path,
        help="the published file, or a folder with it (default: download from the Hugging Face hub)",
    )
    command.add_argument(
        "--output", metavar="FILE", type=path, help="file to write (default: data/NAME.parquet)"
    )
    command.set_defaults(handler=run_data)


DATA_HELP = """\
    Turn a published data set into the parquet file that training or evaluation reads: DAPO's rows and prompt
    template, every problem once, with one answer.

      dapo     DAPO-Math-17k, the training problems
      aime24   AIME 2024, 30 problems
      aime25   AIME 2025, 30 problems

    Prints how many rows were read, dropped and refused, and the SHA-256 of both files. A prompt with different
    answers is dropped. A file with another number of problems than the published set is refused. The same input
    gives the same bytes.

    examples:
      megatron-fipo data dapo
      megatron-fipo data dapo --from downloads/dapo-math-17k.parquet --output /data/dapo.parquet
      megatron-fipo data aime25 --from downloads/AIME2025
"""


def run_data(arguments: argparse.Namespace) -> int:
    from megatron_fipo.errors import UserError
    from megatron_fipo.outputs import check_output_file
    from megatron_fipo.tasks.published.files import download, find_files, sha256, write_rows
    from megatron_fipo.tasks.published.selection import select
    from megatron_fipo.tasks.published.sets import SETS

    published = SETS[arguments.name]
    output = arguments.output or Path("data") / f"{published.name}.parquet"
    check_output_file(output, "--output")
    if arguments.source is None:
        say(f"downloading {published.address}")
        files = [download(published)]
    else:
        files = find_files(published, arguments.source)
    if output.exists() and any(output.samefile(file) for file in files):
        raise UserError(f"--output {output} is the file that is read; choose another")
    selection = select(published, files)
    write_rows(published, selection.kept, output)
    for file in files:
        print(f"{file}  sha256 {sha256(file)}")
    for line in selection.report():
        print(line)
    print(f"wrote {len(selection.kept):,} problems to {output}  sha256 {sha256(output)}")
    return 0
