"""Why a process of Ray ended: the first error in its own output, and where that is."""

import re
from pathlib import Path

import ray

from megatron_fipo.errors import first_line, ray_logs

_EXCEPTION = re.compile(r"(?<![\w.])((?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit): .+)")
"""The last line of a traceback, possibly after a prefix, as vLLM's processes print it."""
_CRASH = re.compile(r"(?i)\b(fatal|error|terminate called|segmentation fault|out of memory|aborted|killed)\b")
_PID = re.compile(r"^\s*pid: (\d+)", re.MULTILINE)
"""In the message of `ActorDiedError`, which has it nowhere else."""
MAX_LENGTH = 300


def first_error(output: str) -> str | None:
    """The first line of `output` that states an error: of an exception its type and message, else the line; None without one."""
    lines = [line.strip() for line in output.splitlines()]
    matches = (match.group(1) for line in lines if (match := _EXCEPTION.search(line)))
    crashes = (line for line in lines if _CRASH.search(line))
    found = next(matches, None) or next(crashes, None)
    return None if found is None else found[:MAX_LENGTH].rstrip(". ")


def why_it_died(error: ray.exceptions.RayError) -> str:
    """Why an actor died, for a sentence: the first error of its output and the file, or, without one, Ray's reason and folder."""
    message = str(error)
    if isinstance(error, ray.exceptions.RayActorError) and error.actor_init_failed:
        return first_error(message) or first_line(error)
    pid = _PID.search(message)
    if pid is not None:
        for log in sorted(Path(ray_logs()).glob(f"worker-*-{pid.group(1)}.err")):
            reason = first_error(log.read_text(errors="replace"))
            if reason is not None:
                return f"{reason}; see {log}"
    return f"{first_line(error)}; see {ray_logs()}"
