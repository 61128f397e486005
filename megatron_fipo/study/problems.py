"""Accuracy and length of each held-out problem of a run, from the table of an evaluation (`run_dir/evaluations/`)."""

import json
import math
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fipo.errors import UserError
from megatron_fipo.run_dir import evaluation_table
from megatron_fipo.study.results import ACCURACY, LENGTH, Measure

Problem = tuple[Hashable, ...]
"""Set, id, prompt and ground truth: an id alone may be another problem under another seed. The set comes first."""
BY_PROBLEM = (ACCURACY, LENGTH)
"""The measures that have a value for each problem."""


@dataclass(frozen=True)
class ProblemValues:
    """Means over the responses to each problem of one evaluation."""

    accuracy: dict[Problem, float]
    length: dict[Problem, float]

    def of(self, measure: Measure) -> dict[Problem, float]:
        """KeyError for a measure that is not in `BY_PROBLEM`."""
        return {ACCURACY: self.accuracy, LENGTH: self.length}[measure]


def _finite(value: Any) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{value} is no length")
    return float(value)


def read_problems(run_dir: Path, iteration: int) -> ProblemValues | None:
    """The values of the evaluation after this iteration; None if the run wrote no table. Raises UserError."""
    path = evaluation_table(run_dir, iteration)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove the file") from None
    right: dict[Problem, list[float]] = {}
    lengths: dict[Problem, list[float]] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            problem = (row["set"], row["problem_id"], row["prompt"], row["ground_truth"])
            right.setdefault(problem, []).append(float(row["accuracy"] > 0))
            lengths.setdefault(problem, []).append(_finite(row["length"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} line {number} is not a row of an evaluation ({error!r}); remove the file"
            ) from None
    return ProblemValues(
        *({key: sum(all_) / len(all_) for key, all_ in part.items()} for part in (right, lengths))
    )
