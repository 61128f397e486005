"""Peak memory of a process and all that descend from it, while it runs."""

import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_fipo.node.processes import end_with_parent

PERIOD_S = 1.0
"""Between two readings; one takes some 10 ms for twenty processes."""


@dataclass(frozen=True)
class Ended:
    """A process that has ended."""

    code: int
    """Its exit code; negative if a signal ended it."""
    seconds: float
    """From its start to its end."""
    peak_bytes: int
    """The most memory of the tree at a reading (`tree_bytes`)."""


def run(command: Sequence[str], log: Path, environment: Mapping[str, str], folder: Path) -> Ended:
    """Run a command in `folder` to its end; what it prints goes to `log`."""
    start, peak = time.perf_counter(), 0
    with (
        log.open("wb") as stream,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            cwd=folder,
            preexec_fn=end_with_parent,
        ) as process,
    ):
        while process.poll() is None:
            peak = max(peak, tree_bytes(process.pid))
            with suppress(subprocess.TimeoutExpired):
                process.wait(PERIOD_S)
    return Ended(process.returncode, time.perf_counter() - start, peak)


def tree_bytes(root: int) -> int:
    """Proportional set size of a process and its descendants: a page that n processes share counts 1/n in each. 0 if it has ended."""
    try:
        process = psutil.Process(root)
        members = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    return sum(_proportional_bytes(member.pid) for member in members)


def _proportional_bytes(process: int) -> int:
    """0 for a process that has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
    return 0
