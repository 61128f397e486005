"""What a run writes down about itself: `metrics.jsonl` and `samples.jsonl` in its folder, one JSON object per line.

The files are the source of the report and may be read while the run goes on. Lines are only ever appended, each flushed as it is
written, so a crash costs at most the line being written: reading ignores such a torn last line and says so, and the next run
removes it. A run that resumes at iteration k first drops the lines of later iterations (`truncate_after`), because it will write
them again.
"""

import json
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_fipo.errors import UserError, writing

Kind = Literal["iteration", "evaluation"]

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One line of `metrics.jsonl`."""

    kind: Kind
    iteration: int
    time: float
    """Unix seconds."""
    values: dict[str, float]
    """Metric name → value; NaN where the value was not finite."""


@dataclass(frozen=True)
class Sample:
    """One training response to look at, one line of `samples.jsonl`."""

    iteration: int
    prompt: str
    tokens: list[str]
    """The response, one decoded piece of text per token; joined they read as the response."""
    influence_weights: list[float] | None
    """The weight f_t of each token in the last mini-step that trained on it; None for objectives without weights."""
    reward: float
    accuracy: float
    advantage: float
    finish_reason: str

    def __post_init__(self) -> None:
        if self.influence_weights is not None and len(self.influence_weights) != len(self.tokens):
            raise ValueError(
                f"a sample has {len(self.tokens)} tokens but {len(self.influence_weights)} influence weights"
            )


class JsonLinesLog:
    """An append-only file of JSON objects that each carry an `iteration`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if _ends_torn(path):
            self._rewrite(_read_rows(path))

    def truncate_after(self, iteration: int) -> None:
        """Drop the lines of iterations later than `iteration`, all at once or not at all."""
        lines = kept = 0
        for row in _read_rows(self.path):
            lines += 1
            kept += row["iteration"] <= iteration
        if kept == 0:
            self.path.unlink(missing_ok=True)
        elif kept < lines:
            self._rewrite(row for row in _read_rows(self.path) if row["iteration"] <= iteration)

    def _append(self, row: dict[str, Any]) -> None:
        with writing(self.path), self.path.open("a", encoding="ascii") as file:
            file.write(_to_line(row))

    def _rewrite(self, rows: Iterable[dict[str, Any]]) -> None:
        temporary = self.path.with_name(self.path.name + ".tmp")
        with writing(self.path):
            with temporary.open("w", encoding="ascii") as file:
                file.writelines(_to_line(row) for row in rows)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)


class MetricsLog(JsonLinesLog):
    """`run_dir/metrics.jsonl`: the numbers of each iteration and each evaluation."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir / METRICS_FILE)

    def log(self, kind: Kind, iteration: int, values: Mapping[str, float]) -> None:
        """Append one line; anything `float()` takes is a value, and non-finite ones become null."""
        numbers = {name: float(value) for name, value in values.items()}
        self._append({"kind": kind, "iteration": iteration, "time": time.time(), "values": numbers})


class SampleLog(JsonLinesLog):
    """`run_dir/samples.jsonl`: a few responses of each evaluated iteration, with what training made of each token."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir / SAMPLES_FILE)

    def log(self, sample: Sample) -> None:
        self._append(asdict(sample))


def read_metrics(run_dir: Path) -> list[Record]:
    """All lines of `metrics.jsonl` in order; none where the file is missing. Raises `UserError` on a line that is not a record."""
    path = run_dir / METRICS_FILE
    records = []
    for number, row in enumerate(_read_rows(path), 1):
        try:
            values = {name: _from_null(value) for name, value in row["values"].items()}
            records.append(Record(row["kind"], int(row["iteration"]), float(row["time"]), values))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} line {number} is not a metrics record; remove the line") from error
    return records


def read_samples(run_dir: Path) -> Iterator[Sample]:
    """The lines of `samples.jsonl` in order, one at a time, since long responses make it a large file; none where it is missing.

    Raises `UserError` on a line that is not a sample.
    """
    path = run_dir / SAMPLES_FILE
    for number, row in enumerate(_read_rows(path), 1):
        try:
            if row["influence_weights"] is not None:
                row["influence_weights"] = [_from_null(weight) for weight in row["influence_weights"]]
            for name in ("reward", "accuracy", "advantage"):
                row[name] = _from_null(row[name])
            sample = Sample(**row)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} line {number} is not a sample; remove the line") from error
        yield sample


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; a last line that does not parse was torn by a crash and is ignored with a warning."""
    if not path.exists():
        return
    with path.open("rb") as file:
        line, number = file.readline(), 1
        while line:
            following = file.readline()
            try:
                row = json.loads(line)
                if not isinstance(row, dict) or "iteration" not in row:
                    raise ValueError("no iteration")
            except ValueError as error:
                if following:
                    raise UserError(f"{path} line {number} is damaged; remove the line") from error
                _logger.warning("%s: ignored the last line (%d), which a crash left unfinished", path, number)
            else:
                yield row
            line, number = following, number + 1


def _ends_torn(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _to_line(row: dict[str, Any]) -> str:
    return json.dumps(_to_null(row), allow_nan=False) + "\n"


def _to_null(value: Any) -> Any:
    """`value` with non-finite floats, wherever they are, replaced by None: JSON has no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _to_null(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_to_null(entry) for entry in value]
    return value


def _from_null(value: float | None) -> float:
    return math.nan if value is None else float(value)
