"""Why a process of Ray ended: the first error in its own output, and where that is."""

import os
import re
from pathlib import Path

import ray

from megatron_fipo.errors import LOG_DIR_VARIABLE, first_line, logs_place, ray_logs
from megatron_fipo.network import node_address

_EXCEPTION = re.compile(r"(?<![\w.])((?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit): .+)")
"""The last line of a traceback, possibly after a prefix, as vLLM's processes print it."""
_CRASH = re.compile(r"(?i)\b(fatal|error|terminate called|segmentation fault|out of memory|aborted|killed)\b")
_PID = re.compile(r"^\s*pid: (\d+)", re.MULTILINE)
_ADDRESS = re.compile(r"^\s*ip: (\S+)", re.MULTILINE)
"""In the message of `ActorDiedError`, which has them nowhere else."""
MAX_LENGTH = 300


def first_error(output: str) -> str | None:
    """The first line of `output` that states an error: of an exception its type and message, else the line; None without one."""
    lines = [line.strip() for line in output.splitlines()]
    matches = (match.group(1) for line in lines if (match := _EXCEPTION.search(line)))
    crashes = (line for line in lines if _CRASH.search(line))
    found = next(matches, None) or next(crashes, None)
    return None if found is None else found[:MAX_LENGTH].rstrip(". ")


def why_it_died(error: ray.exceptions.RayError) -> str:
    """Why an actor died, for a sentence: the first error of its output and the file, or, without one, Ray's reason and folder.

    The output of another node can be read only if the job copies it (`LOG_DIR_VARIABLE`).
    """
    message = str(error)
    if isinstance(error, ray.exceptions.RayActorError) and error.actor_init_failed:
        return first_error(message) or first_line(error)
    pid, address = _PID.search(message), _ADDRESS.search(message)
    elsewhere = address is not None and address.group(1) != node_address()
    if pid is not None:
        for log in _outputs(pid.group(1), elsewhere):
            reason = first_error(log.read_text(errors="replace"))
            if reason is not None:
                return f"{reason}; see {log if elsewhere else _lasting(log)}"
    node = address.group(1) if address is not None and elsewhere else None
    return f"{first_line(error)}; see {logs_place(node)}"


def _lasting(log: Path) -> str:
    """Where a file of this node's logs will be found: a job copies it and then removes it."""
    return f"{log.name} in {logs_place()}" if LOG_DIR_VARIABLE in os.environ else str(log)


def _outputs(pid: str, elsewhere: bool) -> list[Path]:
    """The error outputs of a process of this node or, of one `elsewhere`, those that the job has copied.

    Processes of several nodes may have the same pid: then it is not known which is meant.
    """
    name = f"worker-*-{pid}.err"
    if not elsewhere:
        return sorted(Path(ray_logs()).glob(name))
    job = os.environ.get(LOG_DIR_VARIABLE)
    found = sorted(Path(job).rglob(name)) if job else []
    return found if len(found) == 1 else []
