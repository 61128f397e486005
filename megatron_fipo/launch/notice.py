"""How long before the time limit a run must be told to stop. Pure."""

import math
from collections.abc import Sequence

from megatron_fipo.errors import UserError
from megatron_fipo.launch.script import DEFAULT_NOTICE_S
from megatron_fipo.launch.settings import LONGEST_NOTICE_S
from megatron_fipo.run_dir.metrics_log import Record

PHASES = ("old_log_probs", "update", "weight_sync", "checkpoint")
"""What a run completes, at most, between the signal and its end: it finishes an update and saves."""
RECENT = 50
"""Iterations to look at."""
MARGIN = 2.0
STEP_S = 60
"""Slurm sends the signal up to a minute late."""


def notice_s(records: Sequence[Record]) -> int:
    """Seconds before the time limit, in full minutes: twice the longest of each phase lately, and a minute.

    DEFAULT_NOTICE_S if the run has logged no iteration. At most what sbatch accepts.
    """
    recent = [record.values for record in records if record.kind == "iteration"][-RECENT:]
    if not recent:
        return DEFAULT_NOTICE_S
    longest = sum(_longest([values.get(f"time/{phase}", 0.0) for values in recent]) for phase in PHASES)
    steps = math.ceil(min(MARGIN * longest, LONGEST_NOTICE_S) / STEP_S) + 1
    return min(steps * STEP_S, LONGEST_NOTICE_S)


def check_limit(time: str | None, notice: int) -> None:
    """Raise UserError if a run with this time limit (as for sbatch) would be told to stop as soon as it starts."""
    limit = 0 if time is None else limit_s(time)
    if 0 < limit <= notice:
        raise UserError(
            f"time={time} is {limit:,} s, not longer than the {notice:,} s before its end at which the run is told to save and "
            "stop; raise time or lower signal_notice_s"
        )


def limit_s(time: str) -> int:
    """Seconds of a time limit: `minutes[:seconds]`, `hours:minutes:seconds` or `days-hours[:minutes[:seconds]]`. 0: none."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(parts) == 3:
        return (parts[0] * 60 + parts[1]) * 60 + parts[2]
    minutes, seconds = (*parts, 0)[:2]
    return minutes * 60 + seconds


def _longest(seconds: list[float]) -> float:
    return max((value for value in seconds if math.isfinite(value)), default=0.0)
