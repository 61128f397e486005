"""The logs of a run: `metrics.jsonl` and `samples.jsonl` in its folder, one JSON object per line.

The report is made from these files, and they may be read while the run is in progress. Lines are only
appended, and each is flushed when it is written, so a crash costs at most the line being written. Reading
ignores such an incomplete last line with a warning, and the next run removes it. A run that resumes at
iteration k first drops the lines of later iterations (`truncate_after`), because it writes them again.
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

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One line of `metrics.jsonl`."""

    kind: Kind
    iteration: int
    time: float
    """Unix seconds."""
    values: dict[str, float]
    """Metric name → value; NaN if the value was not finite."""


@dataclass(frozen=True)
class Sample:
    """One training response to show, one line of `samples.jsonl`."""

    iteration: int
    prompt: str
    tokens: list[str]
    """The response as one decoded text per token; concatenated, the response."""
    influence_weights: list[float] | None
    """The weight f_t of each token in the last mini-step that trained on it; None for objectives without
    weights.
    """
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
        if _ends_incomplete(path):
            self._rewrite(_read_objects(path))

    def truncate_after(self, iteration: int) -> None:
        """Drop the lines of iterations later than `iteration`, atomically."""
        lines = kept = 0
        for entry in _read_objects(self.path):
            lines += 1
            kept += entry["iteration"] <= iteration
        if kept == 0:
            self.path.unlink(missing_ok=True)
        elif kept < lines:
            self._rewrite(entry for entry in _read_objects(self.path) if entry["iteration"] <= iteration)

    def _append(self, entry: dict[str, Any]) -> None:
        with writing(self.path), self.path.open("a", encoding="ascii") as file:
            file.write(_to_line(entry))

    def _rewrite(self, entries: Iterable[dict[str, Any]]) -> None:
        temporary = self.path.with_name(self.path.name + ".tmp")
        with writing(self.path):
            with temporary.open("w", encoding="ascii") as file:
                file.writelines(_to_line(entry) for entry in entries)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)


class MetricsLog(JsonLinesLog):
    """`run_dir/metrics.jsonl`: the metrics of each iteration and each evaluation."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir / METRICS_FILE)

    def log(self, kind: Kind, iteration: int, values: Mapping[str, float]) -> None:
        """Append one line. Values may be anything that `float()` accepts; non-finite ones become null."""
        numbers = {name: float(value) for name, value in values.items()}
        self._append({"kind": kind, "iteration": iteration, "time": time.time(), "values": numbers})


class SampleLog(JsonLinesLog):
    """`run_dir/samples.jsonl`: responses of evaluated iterations, with each token's influence weight."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir / SAMPLES_FILE)

    def log(self, sample: Sample) -> None:
        self._append(asdict(sample))


def read_metrics(run_dir: Path) -> list[Record]:
    """All lines of `metrics.jsonl` in order; none if the file is missing.

    Raises `UserError` for a line that is not a record.
    """
    path = run_dir / METRICS_FILE
    records = []
    for number, entry in enumerate(_read_objects(path), 1):
        try:
            values = {name: _from_null(value) for name, value in entry["values"].items()}
            records.append(Record(entry["kind"], int(entry["iteration"]), float(entry["time"]), values))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} line {number} is not a metrics record; remove the line") from error
    return records


def read_samples(run_dir: Path) -> Iterator[Sample]:
    """The lines of `samples.jsonl` in order, one at a time, because long responses make the file large.

    None if the file is missing. Raises `UserError` for a line that is not a sample.
    """
    path = run_dir / SAMPLES_FILE
    for number, entry in enumerate(_read_objects(path), 1):
        try:
            if entry["influence_weights"] is not None:
                entry["influence_weights"] = [_from_null(weight) for weight in entry["influence_weights"]]
            for name in ("reward", "accuracy", "advantage"):
                entry[name] = _from_null(entry[name])
            sample = Sample(**entry)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} line {number} is not a sample; remove the line") from error
        yield sample


def _read_objects(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file.

    A last line that does not parse was left incomplete by a crash; it is ignored with a warning. Raises `UserError`.
    """
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; choose another run_dir or fix this one"
        ) from None
    with stream as file:
        line, number = file.readline(), 1
        while line:
            following = file.readline()
            try:
                entry = json.loads(line)
                if not isinstance(entry, dict) or "iteration" not in entry:
                    raise ValueError("no iteration")
            except ValueError as error:
                if following:
                    raise UserError(f"{path} line {number} is damaged; remove the line") from error
                logger.warning("%s: ignored the last line (%d), which a crash left incomplete", path, number)
            else:
                yield entry
            line, number = following, number + 1


def _ends_incomplete(path: Path) -> bool:
    """Whether the last line has no newline."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _to_line(entry: dict[str, Any]) -> str:
    return json.dumps(_to_null(entry), allow_nan=False) + "\n"


def _to_null(value: Any) -> Any:
    """`value` with non-finite floats at any depth replaced by None, because JSON has no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _to_null(nested) for key, nested in value.items()}
    if isinstance(value, list | tuple):
        return [_to_null(nested) for nested in value]
    return value


def _from_null(value: float | None) -> float:
    return math.nan if value is None else float(value)
