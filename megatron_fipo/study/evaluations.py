"""The table of an evaluation of a run (`run_dir/evaluations/`): a row per response to a held-out problem."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fipo.errors import UserError
from megatron_fipo.run_dir import evaluation_table

Problem = tuple[str, str, str, str]
"""Set, id, prompt and ground truth: an id alone may be another problem under another seed."""
_LARGEST = 1e15


@dataclass(frozen=True)
class Response:
    """One row: a response to a problem."""

    problem: Problem
    right: bool
    length: float
    """In tokens."""
    text: str


def read_evaluation(run_dir: Path, iteration: int) -> Iterator[Response]:
    """The responses of the evaluation after this iteration, one at a time in the table's order; none without a table.

    Raises UserError when it comes to a row that cannot be read.
    """
    path = evaluation_table(run_dir, iteration)
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _response(line, path, number)
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); restore it, or move it away: differences are then paired by seed alone"
        ) from None


def _response(line: str, path: Path, number: int) -> Response:
    try:
        row = json.loads(line)
        problem = (
            _text(row["set"]),
            _text(row["problem_id"]),
            _text(row["prompt"]),
            _text(row["ground_truth"]),
        )
        length = _number(row["length"], least=0)
        return Response(
            problem, _number(row["accuracy"], least=-_LARGEST) > 0, length, _text(row["response"])
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} line {number} is not a row of an evaluation ({error!r:.200}); restore the file, or move it away: "
            "differences are then paired by seed alone"
        ) from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.60} is not a text")
    return value


def _number(value: Any, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= _LARGEST:
        raise ValueError(f"{value!r:.60} is not a number of at least {least:g}")
    return float(value)
