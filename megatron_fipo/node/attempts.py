"""The files by which the attempts of a job know of each other: `logs/JOB.json`, and the checkpoints."""

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from megatron_fipo.errors import UserError
from megatron_fipo.node.requeue import History
from megatron_fipo.outputs import write_output
from megatron_fipo.run_dir.run_directory import NAME


def read_history(logs: Path, job: str) -> History:
    """The history of a job whose attempts have their folders in `logs`. Raises UserError if its file is damaged."""
    path = _path(logs, job)
    try:
        return History(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return History()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; remove it") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged; remove it, and the count of restarts begins again") from error


def write_history(logs: Path, job: str, history: History) -> None:
    """Replace the history of a job atomically. Raises UserError."""
    write_output(_path(logs, job), json.dumps(asdict(history)))


def progress(run_dir: Path) -> str | None:
    """The newest checkpoint and when it was completed, as a text that changes with every save; None without one."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return None
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]
    for _, newest in sorted(found, reverse=True):
        with suppress(OSError):  # a link to a checkpoint that was removed
            return f"{newest.name} {newest.stat().st_mtime_ns}"
    return None


def _path(logs: Path, job: str) -> Path:
    return logs / f"{job}.json"
