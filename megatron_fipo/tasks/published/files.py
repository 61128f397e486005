"""The files of a published set: found where a user has put them or downloaded, and the file of rows that is made of them."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet

from megatron_fipo.errors import UserError, one_line
from megatron_fipo.outputs import write_output
from megatron_fipo.tasks.published.forms import PublishedProblem
from megatron_fipo.tasks.published.sets import PublishedSet

SUFFIXES = (".parquet", ".jsonl")
SCHEMA = pyarrow.schema(
    [
        ("data_source", pyarrow.string()),
        (
            "prompt",
            pyarrow.list_(pyarrow.struct([("content", pyarrow.string()), ("role", pyarrow.string())])),
        ),
        ("ability", pyarrow.string()),
        ("reward_model", pyarrow.struct([("ground_truth", pyarrow.string()), ("style", pyarrow.string())])),
        ("extra_info", pyarrow.struct([("index", pyarrow.string())])),
    ]
)
"""The columns of DAPO's published file."""


def find_files(published: PublishedSet, source: Path) -> list[Path]:
    """The data files at `source`: itself, or those of a folder, sorted. Raises `UserError` if there are none.

    A folder may hold several sets: if it has a file of the published name, the others are not read.
    """
    if not source.exists():
        raise UserError(f"--from {source} does not exist; download {published.address}")
    if not source.is_dir():
        return [source]
    files = sorted(
        path
        for path in source.rglob("*")
        if path.suffix in SUFFIXES
        and not path.is_dir()
        and not any(part.startswith(".") for part in path.relative_to(source).parts)
    )
    if not files:
        raise UserError(
            f"--from {source} is a folder without {' or '.join(SUFFIXES)} files; download {published.address} into it"
        )
    name = Path(published.file).name
    return [file for file in files if file.name == name] or files


def download(published: PublishedSet) -> Path:
    """The published file, downloaded into the cache of the Hugging Face hub.

    Raises `UserError` without a network, which names the file and where to put it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # it reports every attempt
    try:
        return Path(hf_hub_download(published.repository, published.file, repo_type="dataset"))
    except Exception as error:  # of the hub, of one of its HTTP libraries, or of the operating system
        raise UserError(
            f"cannot download {published.repository} from the Hugging Face hub ({_reason(error)}); on a machine with a "
            f"network download {published.address}, copy it here and give it as --from FILE"
        ) from error


def _reason(error: BaseException) -> str:
    """Of the error that the others were raised from, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error)[:200]


def write_rows(published: PublishedSet, problems: Sequence[PublishedProblem], output: Path) -> None:
    """Write the rows as parquet; the file is complete or as it was before. Equal problems give equal bytes."""
    rows = [
        {
            "data_source": published.data_source,
            "prompt": [{"content": problem.prompt, "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": problem.answer, "style": "rule"},
            "extra_info": {"index": problem.index or f"{published.name}-{number}"},
        }
        for number, problem in enumerate(problems, start=1)
    ]
    buffer = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, SCHEMA), buffer, compression="zstd")
    write_output(output, buffer.getvalue().to_pybytes())


def sha256(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
