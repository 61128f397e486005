"""What became of a run that a study started: a file per run, beside its folder.

study/runs/NAME/            the run_dir
study/outcomes/NAME.json    this
study/configs/NAME.yaml     the settings that it was started with
study/logs/NAME.log         what its process printed
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from megatron_fipo.errors import UserError
from megatron_fipo.exit_codes import DONE, SAVED
from megatron_fipo.outputs import write_output

Status = Literal["complete", "failed", "stopped", "missing"]
"""`stopped` by the user or a scheduler: the same command continues it. `missing`: never started."""
SENTENCE = "megatron-fipo: "
"""Begins the line in which a command says why it ended."""
LAST_BYTES = 20_000
"""Of a log, to look for that line."""


@dataclass(frozen=True)
class Outcome:
    """How the last attempt at a run ended."""

    status: Status
    reason: str = ""
    """In one sentence; empty for a complete run."""


@dataclass(frozen=True)
class StudyFolder:
    """The paths in a study's folder."""

    path: Path

    @property
    def settings(self) -> Path:
        return self.path / "study.yaml"

    def run_dir(self, name: str) -> Path:
        return self.path / "runs" / name

    def config(self, name: str) -> Path:
        return self.path / "configs" / f"{name}.yaml"

    def log(self, name: str) -> Path:
        return self.path / "logs" / f"{name}.log"

    def outcome(self, name: str) -> Outcome:
        """Of a run; `missing` if it was never ended. Raises UserError for a damaged file."""
        path = self._outcome(name)
        try:
            outcome = Outcome(**json.loads(path.read_text()))
        except FileNotFoundError:
            return Outcome("missing")
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} is not the outcome of a run ({error}); remove it") from None
        if not isinstance(outcome.reason, str) or outcome.status not in get_args(Status):
            raise UserError(f"{path} is not the outcome of a run (status {outcome.status!r}); remove it")
        return outcome

    def ended(self) -> list[str]:
        """The names of all runs with an outcome."""
        return [path.stem for path in (self.path / "outcomes").glob("*.json")]

    def save_outcome(self, name: str, outcome: Outcome) -> None:
        """Write it completely or not at all. Raises UserError."""
        write_output(self._outcome(name), json.dumps(asdict(outcome)) + "\n")

    def _outcome(self, name: str) -> Path:
        return self.path / "outcomes" / f"{name}.json"


def outcome_of(code: int, log: Path, *, stopped: bool, limit_minutes: float | None) -> Outcome:
    """The outcome of a process that ended with this exit code (negative: by that signal).

    `stopped`: the study was asked to stop. `limit_minutes`: the time limit, if that ended the process.
    """
    if code == DONE:
        return Outcome("complete")
    if limit_minutes is not None:
        return Outcome("failed", f"not complete after time_limit_minutes={limit_minutes:g}")
    if stopped:
        return Outcome("stopped", "the study was stopped; the same command continues it")
    if code == SAVED:
        return Outcome("stopped", "its process was asked to stop; the same command continues it")
    return Outcome("failed", _reason(code, log))


def _reason(code: int, log: Path) -> str:
    """What the log says last."""
    ended = f"signal {-code}" if code < 0 else f"exit code {code}"
    with log.open("rb") as file:
        file.seek(max(file.seek(0, 2) - LAST_BYTES, 0))
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    told = [line.removeprefix(SENTENCE) for line in lines if line.startswith(SENTENCE)]
    last = (told or lines or ["it printed nothing"])[-1]
    return f"{last} ({ended}; {log})"
