"""The table of an evaluation of a run (`run_dir/evaluations/`): a row per response to a held-out problem."""

import json
import math
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fipo.errors import UserError
from megatron_fipo.run_dir import evaluation_table

Problem = tuple[Hashable, ...]
"""Set, id, prompt and ground truth: an id alone may be another problem under another seed. The set comes first."""


@dataclass(frozen=True)
class Response:
    """One row: a response to a problem."""

    problem: Problem
    right: bool
    length: float
    """In tokens."""
    text: str


def _finite(value: Any) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{value} is no length")
    return float(value)


def read_evaluation(run_dir: Path, iteration: int) -> list[Response] | None:
    """The responses of the evaluation after this iteration, in the table's order; None if the run wrote no table.

    Raises UserError.
    """
    path = evaluation_table(run_dir, iteration)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove the file") from None
    responses = []
    for number, line in enumerate(filter(None, lines), 1):
        try:
            row = json.loads(line)
            problem = (row["set"], row["problem_id"], row["prompt"], row["ground_truth"])
            right, length = bool(row["accuracy"] > 0), _finite(row["length"])
            responses.append(Response(problem, right, length, str(row["response"])))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} line {number} is not a row of an evaluation ({error!r}); remove the file"
            ) from None
    return responses
