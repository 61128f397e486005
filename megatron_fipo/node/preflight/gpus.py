"""The GPUs of this node: what torch sees, what nvidia-smi reports, and hardware errors in the kernel log."""

import csv
import re
import shutil
import subprocess
import time

from megatron_fipo.environment import find_accelerators
from megatron_fipo.node.preflight.facts import Gpu, Gpus, Xid

SMI_TIMEOUT_S = 30.0
COUNTERS = (
    "index",
    "name",
    "ecc.errors.uncorrected.volatile.total",
    "remapped_rows.pending",
    "remapped_rows.failure",
)
HARDWARE_XIDS = {48, 62, 64, 74, 79, 92, 94, 95, 110, 119, 120, 136, 140, 143}
"""Errors of memory, NVLink, bus and firmware. The others are those of programs (13, 31, 43, 45) or are reports (63)."""
_XID = re.compile(r"^\[\s*(?P<time>[0-9.]+)\].*NVRM: Xid \((?:PCI:)?(?P<device>[^)]+)\): (?P<code>[0-9]+)")


def inspect_gpus() -> Gpus:
    """The GPUs of this node; imports torch."""
    found = find_accelerators()
    listed, error = None, None
    if shutil.which("nvidia-smi"):
        try:
            listed = parse_listing(_smi())
        except (OSError, subprocess.SubprocessError, ValueError) as problem:
            error = _reason(problem)
    return Gpus(tuple(card.name for card in found.cards), listed, error, _kernel_xids(), found)


def parse_listing(text: str) -> tuple[Gpu, ...]:
    """The lines of `nvidia-smi --format=csv,noheader,nounits` for `COUNTERS`. Raises ValueError with a line that is none."""
    gpus = []
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        if len(row) != len(COUNTERS) or not row[0].isdigit():
            raise ValueError(", ".join(row))
        index, name, ecc, pending, failed = (value.strip() for value in row)
        gpus.append(
            Gpu(int(index), name, int(ecc) if ecc.isdigit() else None, _answer(pending), _answer(failed))
        )
    return tuple(gpus)


def parse_kernel_log(text: str, uptime_s: float) -> tuple[Xid, ...]:
    """Hardware errors in the output of `dmesg`, whose times are seconds after the start of the machine."""
    found = [match for line in text.splitlines() if (match := _XID.match(line))]
    return tuple(
        Xid(int(match["code"]), match["device"], round((uptime_s - float(match["time"])) / 3600, 2))
        for match in found
        if int(match["code"]) in HARDWARE_XIDS
    )


def _answer(text: str) -> bool | None:
    """`Yes` and `No`, or the count that some drivers print; `[N/A]` is None."""
    return {"yes": True, "no": False}.get(text.lower(), int(text) > 0 if text.isdigit() else None)


def _smi() -> str:
    query = ["nvidia-smi", f"--query-gpu={','.join(COUNTERS)}", "--format=csv,noheader,nounits"]
    return subprocess.run(query, capture_output=True, text=True, check=True, timeout=SMI_TIMEOUT_S).stdout


def _reason(problem: Exception) -> str:
    """nvidia-smi prints its errors to standard output."""
    if isinstance(problem, subprocess.CalledProcessError):
        lines = (problem.stdout + problem.stderr).strip().splitlines()
        return lines[-1] if lines else f"exit code {problem.returncode}"
    return " ".join(str(problem).split())


def _kernel_xids() -> tuple[Xid, ...] | None:
    try:
        log = subprocess.run(["dmesg"], capture_output=True, text=True, errors="replace", timeout=5.0)
    except (OSError, subprocess.SubprocessError):
        return None
    if log.returncode != 0:
        return None
    return parse_kernel_log(log.stdout, time.monotonic())  # the clock of the kernel's log, on Linux
